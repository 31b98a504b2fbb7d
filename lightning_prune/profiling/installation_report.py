"""A report on the machine and the installation, to be read by people and programs: `lightning-prune doctor`."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_prune._utils.installed_packages import package_version
from lightning_prune._utils.machine_description import Report, describe_machine, section
from lightning_prune._utils.private_paths import without_names
from lightning_prune._utils.readings import NotReadable, attempt
from lightning_prune.profiling.energy_counter import Unavailable, find_counter
from lightning_prune.profiling.noise_probe import SECONDS, noise_of_machine
from lightning_prune.profiling.store_folder import default_folder
from lightning_prune.runtimes.found_devices import NOT_LISTED, devices_of_runtimes, torch_devices
from lightning_prune.runtimes.weight_range import sums_saturate


def machine_report(timing: bool = True, seconds: float = SECONDS, root: Path = Path("/")) -> Report:
    """Describes the machine, the installation, and how noisy the machine is now.

    What cannot be read is a `NotReadable` with the reason. The home folder is `~`, and paths do not name users nor
    texts the machine, so that the report can be published.

    Args:
        timing: Whether the noise is measured, which takes about ten seconds.
        seconds: Of each of the three or four conditions in which it is measured.
        root: Where `/proc` and `/sys` are.

    Returns:
        Section -> name -> a plain value.

    Example:
        >>> from lightning_prune.profiling import machine_report
        >>> report = machine_report(timing=False)
        >>> report["torch"]["threads"] >= 1
        True
    """
    report = describe_machine(root)
    features = report.pop("features")
    report["torch"] = section(attempt(torch_facts))
    report["runtimes"] = section(attempt(devices_of_runtimes))
    report["energy"] = section(attempt(energy_counters))
    if timing:
        report["noise"] = section(attempt(lambda: noise_of_machine(seconds)))
    report["folders"] = section(attempt(cache_facts))
    report["features"] = features
    cleaned: Report = without_names(report)
    return cleaned


def torch_facts() -> dict[str, Any]:
    """Build, threads and kernels of PyTorch, and whether torchvision is of the same build; each for itself."""
    readers: dict[str, Callable[[], Any]] = {
        "build": lambda: str(torch.__version__),
        "torchvision": same_build,
        "cuda": lambda: torch.version.cuda or torch.version.hip or "none in this build",
        "devices": torch_devices,
        "threads": torch.get_num_threads,
        "interop_threads": torch.get_num_interop_threads,
        "kernels": torch.backends.cpu.get_cpu_capability,
        "onednn": torch.backends.mkldnn.is_available,
        "int8_sums_saturate": sums_saturate,
        "matmul_precision": torch.get_float32_matmul_precision,
    }
    return {name: attempt(read) for name, read in readers.items()}


def same_build() -> str | NotReadable:
    """Whether torch and torchvision are of one build: the marks in their versions, and whether an operator runs."""
    if package_version("torchvision") is None:
        return NotReadable("torchvision is not installed")

    def version_and_kept() -> tuple[str, list[int]]:
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
        return torchvision.__version__, torchvision.ops.nms(boxes, torch.tensor([1.0, 0.5]), 0.5).tolist()

    found = attempt(version_and_kept)  # of another build it raises RuntimeError, or cannot be imported
    if isinstance(found, NotReadable):
        return f"not of the build of torch: {found.reason}"
    version, kept = found
    marks = [str(each).partition("+")[2] for each in (torch.__version__, version)]
    if kept != [0]:
        return f"{version}: its nms keeps {kept}, not [0]"
    if marks[0] != marks[1]:
        return f"{version}: not of the build of torch, though its operators run"
    return f"{version}: of the same build, its operators run"


def energy_counters() -> dict[str, Any]:
    """Device -> its energy counter, or why there is none."""

    def counter_of(device: str) -> Any:
        counter = find_counter(device)
        return NotReadable(counter.reason) if isinstance(counter, Unavailable) else counter.name

    devices = torch_devices()
    not_listed = {name: reason for name, reason in devices.items() if name == NOT_LISTED}
    return {name: attempt(partial(counter_of, name)) for name in devices if name not in not_listed} | not_listed


def cache_facts() -> dict[str, Any]:
    """The folder of kept measurements: where it is, how much is in it, and how much room is left."""
    folder = default_folder()
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return {
        "cache": str(folder),
        "exists": folder.is_dir(),
        "writable": os.access(there, os.W_OK),
        "files": len(files),
        "size_mib": round(sum(path.stat().st_size for path in files) / 2**20, 2),
        "free_gib": round(shutil.disk_usage(there).free / 2**30, 1),
    }
