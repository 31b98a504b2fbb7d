"""Counters by zeus (ml.energy/zeus), where it is installed: NVIDIA and AMD GPUs, Jetson, Apple, RAPL by its daemon."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from lightning_prune.errors import DataError
from lightning_prune.profiling.counters import NoCounterError, gpu_uuid

# Of a chip that has everything on it, in mJ: the whole where there is such a figure (Jetson), else the parts (Apple).
_WHOLE = "total_energy_mj"
_PARTS = ("cpu_total_mj", "gpu_mj", "dram_mj", "ane_mj")


class ZeusCounter:
    """What zeus counts for a device. Written for zeus 0.16.

    On a Jetson zeus itself adds up the power that it reads ten times a second, in a process of its own.

    Args:
        device: A CUDA device, the CPU, or Apple's GPU.

    Raises:
        NoCounterError: zeus is not installed, or knows no counter of this device.
    """

    resolution = 0.1

    def __init__(self, device: torch.device) -> None:
        try:
            devices = import_module("zeus.device")
            base: type[Exception] = import_module("zeus.exception").ZeusBaseError
        except ImportError as error:
            raise NoCounterError("zeus is not installed") from error
        self._base = base
        try:
            self.name, self._millijoules = self._find(devices, device)
            self._millijoules()
        except NoCounterError:
            raise
        except Exception as error:  # of zeus, NVML, amdsmi, sysfs: whatever it is, zeus has no counter to offer
            raise NoCounterError(f"zeus: {error}") from error

    def joules(self) -> float:
        """See `EnergyCounter`.

        Raises:
            DataError: The counter cannot be read any more.
        """
        try:
            return self._millijoules() / 1e3
        except (self._base, OSError) as error:
            raise DataError(f"The energy counter of zeus cannot be read any more: {error}") from error

    def _find(self, devices: Any, device: torch.device) -> tuple[str, Callable[[], float]]:
        try:
            chip = devices.get_soc()
        except self._base:  # the usual case: no such chip
            chip = None
        if chip is not None:
            return f"zeus ({type(chip).__name__})", lambda: _chip_millijoules(chip.get_total_energy_consumption())
        if device.type == "cuda":
            gpus = devices.get_gpus()
            index = _gpu_index(gpus, device)
            return "zeus (GPU board)", lambda: float(gpus.get_total_energy_consumption(index))
        if device.type == "cpu":
            cpus = devices.get_cpus()
            every = range(len(cpus))
            return "zeus (processor packages)", lambda: sum(
                float(cpus.get_total_energy_consumption(index).cpu_mj) for index in every
            )
        raise NoCounterError(f"zeus knows no counter of {device.type}")


def _gpu_index(gpus: Any, device: torch.device) -> int:
    """Where a device is in the list of zeus, which goes by the order of the bus and torch's by speed."""
    if torch.version.hip:
        return device.index or 0
    uuid, nvml = gpu_uuid(device), import_module("pynvml")
    for index, gpu in enumerate(gpus.gpus):
        if nvml.nvmlDeviceGetUUID(gpu.handle) == uuid:
            return index
    raise NoCounterError(f"zeus does not list {uuid}")


def _chip_millijoules(measured: Any) -> float:
    whole = getattr(measured, _WHOLE, None)
    if whole is not None:
        return float(whole)
    parts = [getattr(measured, name, None) for name in _PARTS]
    counted = [float(part) for part in parts if part is not None]
    if not counted:
        raise NoCounterError(f"zeus: {type(measured).__name__} holds no energy of the whole chip")
    return sum(counted)
