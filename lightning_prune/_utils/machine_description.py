"""The machine and what is installed on it, as plain values, by Python alone: it works where torch does not."""

import os
import platform
from pathlib import Path
from typing import Any

from lightning_prune import __version__
from lightning_prune._utils.hardware_facts import memory_facts, processor_facts
from lightning_prune._utils.installed_packages import library_versions, missing_features
from lightning_prune._utils.machine_state import read_state
from lightning_prune._utils.nvidia_state import read_gpus
from lightning_prune._utils.process_limits import container_limits
from lightning_prune._utils.readings import NotReadable, attempt
from lightning_prune._utils.system_load import read_load

VARIABLES: tuple[str, ...] = (
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "OMP_WAIT_POLICY",
    "OMP_DYNAMIC",
    "GOMP_CPU_AFFINITY",
)
VARIABLES += ("GOMP_SPINCOUNT", "KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_CBWR")
VARIABLES += ("MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
VARIABLES += ("CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
VARIABLES += ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "LD_PRELOAD")
"""Environment variables that latencies depend on."""

Report = dict[str, dict[str, Any]]
"""Section -> name -> a plain value, or a `NotReadable`."""


def describe_machine(root: Path = Path("/")) -> Report:
    """System, processor, memory, limits, state, load, variables, versions and optional features.

    Args:
        root: Where `/proc` and `/sys` are.
    """
    readers = {
        "system": system_facts,
        "processor": lambda: processor_facts(root),
        "memory": lambda: memory_facts(root),
        "limits": lambda: container_limits(root),
        "state": lambda: {**read_state(root), "nvidia": attempt(read_gpus)},
        "load": lambda: read_load(root),
        "variables": lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ} or {"set": "none"},
        "versions": library_versions,
        "features": missing_features,
    }
    return {name: section(attempt(read)) for name, read in readers.items()}


def section(read: dict[str, Any] | NotReadable) -> dict[str, Any]:
    """A section of a report, also where none of it could be read.

    Args:
        read: As `attempt` returns it.
    """
    return {"all": read} if isinstance(read, NotReadable) else read


def system_facts() -> dict[str, Any]:
    """Versions of this package, Python, the system and its kernel."""
    libc = " ".join(part for part in platform.libc_ver() if part)
    return {
        "lightning_prune": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": _system_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "libc": libc or NotReadable("platform.libc_ver() does not say"),
    }


def _system_name() -> str:
    try:
        release = platform.freedesktop_os_release()
        return release.get("PRETTY_NAME") or release.get("NAME", platform.system())
    except OSError:
        mac = platform.mac_ver()[0]
        return f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
