"""Energy counters of devices: what the hardware itself adds up. Power that is merely sampled is no energy."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_prune.errors import DataError

POWERCAP = Path("/sys/class/powercap")


class EnergyCounter(Protocol):
    """Counts the energy that a device has used.

    Attributes:
        name: What counts, for the table: the library or driver, and the part of the machine.
        resolution: Seconds between two updates of the counter, at most.
    """

    name: str
    resolution: float

    def joules(self) -> float:
        """Energy used since some moment in the past; never less than before."""
        ...


class NoCounterError(Exception):
    """Why a device has no such counter; never leaves this package.

    Args:
        reason: In words.
        exists: Whether there is one that this process may not read.
    """

    def __init__(self, reason: str, exists: bool = False) -> None:
        super().__init__(reason)
        self.exists = exists


class RaplCounter:
    """The processor packages of the machine, by Linux's powercap: Intel, and AMD since Zen. Memory is not in it.

    A package counts everything that runs on it, other programs included. The counter starts again from 0 after some
    minutes to an hour of full load; read it more often than that.

    Args:
        root: Where powercap's zones are.

    Raises:
        NoCounterError: There is no package zone, or this user may not read it.
    """

    name = "RAPL (processor packages)"
    resolution = 0.001

    def __init__(self, root: Path = POWERCAP) -> None:
        found = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        # Not the zones inside of packages, nor `psys`, which has the packages in it.
        packages = [zone for zone in found if re.fullmatch(r"intel-rapl:\d+", zone.name) and _is_package(zone)]
        if not packages:
            raise NoCounterError(f"no RAPL package zone in {root}")
        try:
            self._ranges = {zone / "energy_uj": int((zone / "max_energy_range_uj").read_text()) for zone in packages}
            self._last = {path: int(path.read_text()) for path in self._ranges}
        except PermissionError as error:
            raise NoCounterError(f"{error.filename} may be read by root only", exists=True) from error
        except (OSError, ValueError) as error:
            raise NoCounterError(f"RAPL cannot be read: {error}") from error
        self._microjoules = 0

    def joules(self) -> float:
        """See `EnergyCounter`.

        Raises:
            DataError: The counter cannot be read any more.
        """
        for path, last in self._last.items():
            try:
                now = int(path.read_text())
            except (OSError, ValueError) as error:
                raise DataError(f"The energy counter {path} cannot be read any more: {error}") from error
            self._microjoules += now - last + (self._ranges[path] if now < last else 0)
            self._last[path] = now
        return self._microjoules / 1e6


class NvmlCounter:
    """An NVIDIA GPU, board and memory included, by the counter that Volta and later have (nvidia-ml-py).

    Args:
        device: A CUDA device. It is found by its UUID, so `CUDA_VISIBLE_DEVICES` and the order of devices play no part.

    Raises:
        NoCounterError: nvidia-ml-py is not installed, or this GPU has no counter.
    """

    name = "NVML (GPU board)"
    resolution = 0.1  # NVIDIA states none; 20 to 100 ms are observed

    def __init__(self, device: torch.device) -> None:
        try:
            self._nvml: Any = import_module("pynvml")
        except ImportError as error:
            raise NoCounterError("nvidia-ml-py is not installed; pip install 'lightning-prune[energy]'") from error
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(gpu_uuid(device))
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise NoCounterError(f"NVML: {error}") from error

    def joules(self) -> float:
        """See `EnergyCounter`.

        Raises:
            DataError: The counter cannot be read any more.
        """
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            raise DataError(f"The energy counter of the GPU cannot be read any more: {error}") from error


def gpu_uuid(device: torch.device) -> str:
    """The UUID by which NVML knows a CUDA device.

    Raises:
        NoCounterError: It is no NVIDIA GPU.
    """
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None or torch.version.hip:
        raise NoCounterError(f"{device} is no NVIDIA GPU")
    return f"GPU-{str(uuid).removeprefix('GPU-')}"


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False
