"""The energy counter of a device, read through zeus, or why there is none."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_prune.errors import DataError

NO_COUNTER = "n/a (no energy counter on this device)"
NOT_READABLE = "n/a (the energy counter of this device is not readable by this user)"

# Where zeus looks for RAPL; the second is for containers.
_RAPL = (Path("/sys/class/powercap/intel-rapl"), Path("/zeus_sys/class/powercap/intel-rapl"))
# Fields of zeus's measurement of a system on a chip, in mJ: the total where there is one (Jetson), else the parts
# (Apple).
_CHIP_TOTAL = "total_energy_mj"
_CHIP_PARTS = ("cpu_total_mj", "gpu_mj", "dram_mj", "ane_mj")


class EnergyCounter(Protocol):
    """Measures the energy that a device uses between two moments.

    Attributes:
        name: The source for tables: the library and the part of the machine.
        resolution: Seconds between two updates of the counter, at most.
    """

    name: str
    resolution: float

    def begin(self, window: str) -> None:
        """Starts a window; one of this name that was never ended is dropped."""
        ...

    def end(self, window: str) -> float:
        """Ends a window and returns the joules that the device used in it."""
        ...


@dataclass(frozen=True)
class Unavailable:
    """A device without a readable energy counter.

    Attributes:
        text: What tables show instead of a figure; `str` returns it, too.
        reason: What was searched for, and what was found.
    """

    text: str
    reason: str

    def __str__(self) -> str:
        return self.text


class NoCounterError(Exception):
    """A device has no counter, for a reason. `find_counter` catches it.

    Args:
        reason: In words.
        exists: Whether there is a counter that this user may not read.
    """

    def __init__(self, reason: str, exists: bool = False) -> None:
        super().__init__(reason)
        self.exists = exists


class ZeusCounter:
    """The energy counter of a device, read by a `zeus.monitor.ZeusMonitor` (zeus >= 0.16, extra `energy`).

    NVIDIA GPUs are read by NVML and AMD GPUs by amdsmi (the whole board), processors by Linux's RAPL (all packages,
    without memory), Jetson and Apple silicon as one chip. Power that zeus would only sample and integrate itself, as
    for GPUs older than Volta, is not taken. To follow RAPL counters that restart at 0, zeus starts a process that
    imports the main module, so scripts need `if __name__ == "__main__":`.

    Args:
        device: A CUDA device, the CPU, or Apple's GPU.

    Raises:
        NoCounterError: If zeus is not installed or has no counter of this device.
    """

    resolution = 0.1  # NVIDIA documents none; 20 to 100 ms are observed

    def __init__(self, device: torch.device) -> None:
        try:
            devices: Any = import_module("zeus.device")
            monitor: Any = import_module("zeus.monitor").ZeusMonitor
            self._error: type[Exception] = import_module("zeus.exception").ZeusBaseError
        except ImportError as error:
            raise NoCounterError("zeus is not installed; pip install 'lightning-prune[energy]'") from error
        try:
            self.name, gpus, cpus = self._select(devices, device)
            self._monitor = monitor(gpu_indices=gpus, cpu_indices=cpus)
        except NoCounterError:
            raise
        except Exception as error:  # of zeus, NVML, amdsmi or sysfs: the reason is all that matters here
            raise NoCounterError(f"zeus: {error}", exists="NoPermission" in type(error).__name__) from error

    def begin(self, window: str) -> None:
        """See `EnergyCounter`.

        Raises:
            DataError: If the counter cannot be read any more.
        """
        try:
            self._monitor.begin_window(window, sync_execution=False, restart=True)
        except (self._error, OSError, ValueError) as error:
            raise DataError(f"The energy counter cannot be read any more: {error}") from error

    def end(self, window: str) -> float:
        """See `EnergyCounter`.

        Raises:
            DataError: If the counter cannot be read any more.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The energy consumption of one or more GPUs was measured as zero")
                measured = self._monitor.end_window(window, sync_execution=False)
        except (self._error, OSError, ValueError) as error:
            raise DataError(f"The energy counter cannot be read any more: {error}") from error
        if measured.soc_energy is not None:
            return _chip_joules(measured.soc_energy)
        return float(sum((measured.gpu_energy or measured.cpu_energy or {}).values()))

    def _select(self, devices: Any, device: torch.device) -> tuple[str, list[int], list[int]]:
        """The name of the counter, and the GPUs and processor packages to read."""
        try:
            chip = devices.get_soc()
        except self._error:  # the usual case: no such chip
            chip = None
        if chip is not None:
            return f"zeus ({type(chip).__name__})", [], []
        if device.type == "cuda":
            return "zeus (GPU board)", [_gpu_index(devices.get_gpus(), device)], []
        if device.type == "cpu":
            packages = [index for index, cpu in enumerate(devices.get_cpus().cpus) if _is_package(cpu.cpu_index)]
            if not packages:
                raise NoCounterError("RAPL has no processor package")
            return "zeus (processor packages)", [], packages
        raise NoCounterError(f"zeus has no counter of {device.type}")


def _gpu_index(gpus: Any, device: torch.device) -> int:
    """The position of a device in zeus's list, which is in bus order; that of torch is in order of speed."""
    index = device.index or 0
    if not torch.version.hip:
        uuid = f"GPU-{str(torch.cuda.get_device_properties(device).uuid).removeprefix('GPU-')}"
        uuid_of = import_module("pynvml").nvmlDeviceGetUUID
        index = next((position for position, gpu in enumerate(gpus.gpus) if uuid_of(gpu.handle) == uuid), -1)
        if index < 0:
            raise NoCounterError(f"zeus does not list {uuid}")
    if not gpus.supports_get_total_energy_consumption(index):
        raise NoCounterError("the GPU has no energy counter")
    return index


def _is_package(zone: int) -> bool:
    """Whether a RAPL zone is a processor; zeus also lists `psys`, which contains the processors."""
    names = (root / f"intel-rapl:{zone}" / "name" for root in _RAPL)
    return not any(name.is_file() and name.read_text().startswith("psys") for name in names)


def _chip_joules(measured: Any) -> float:
    total = getattr(measured, _CHIP_TOTAL, None)
    parts = [total] if total is not None else [getattr(measured, name, None) for name in _CHIP_PARTS]
    known = [float(part) for part in parts if part is not None]
    if not known:
        raise DataError(f"zeus: {type(measured).__name__} holds no energy of the whole chip.")
    return sum(known) / 1e3


def find_counter(
    device: torch.device | str, sleep: Callable[[float], None] = time.sleep
) -> EnergyCounter | Unavailable:
    """Finds the energy counter of a device.

    A counter that does not change, as on some virtual machines, counts as none.

    Args:
        device: The device that computes.
        sleep: Waits for the given number of seconds.

    Example:
        >>> from lightning_prune.profiling.energy_counter import find_counter
        >>> print(find_counter("meta"))
        n/a (no energy counter on this device)
    """
    device = torch.device(device)
    if device.type not in ("cuda", "cpu", "mps"):
        return Unavailable(NO_COUNTER, f"there is none for {device.type} devices")
    try:
        counter = ZeusCounter(device)
        counter.begin("search")
        sleep(2 * counter.resolution)
        if counter.end("search") > 0:
            return counter
        return Unavailable(NO_COUNTER, f"{counter.name} does not change")
    except NoCounterError as error:
        return Unavailable(NOT_READABLE if error.exists else NO_COUNTER, str(error))
    except DataError as error:
        return Unavailable(NO_COUNTER, str(error))


@cache
def device_counter(device: torch.device) -> EnergyCounter | Unavailable:
    """The counter of a device, searched for once per process."""
    return find_counter(device)
