"""Energy that a device uses, by its own counters."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lightning_prune._utils.device import synchronize
from lightning_prune.errors import ArgumentError, DataError

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


NO_COUNTER = "n/a (no energy counter on this device)"
NOT_READABLE = "n/a (the energy counter of this device is not readable by this user)"


@dataclass(frozen=True)
class Unavailable:
    """A device whose energy cannot be told.

    Attributes:
        text: What a table says in the figure's place; also what `str` gives.
        reason: What was looked for, and what was found.
    """

    text: str
    reason: str

    def __str__(self) -> str:
        return self.text


def find_counter(
    device: torch.device | str, powercap: Path = POWERCAP, sleep: Callable[[float], None] = time.sleep
) -> EnergyCounter | Unavailable:
    """Finds the energy counter of a device; counters only, for sampled power would be a guess.

    A CUDA device: zeus where installed, else NVML. The CPU: RAPL as Linux shows it, else zeus, whose daemon may read
    what the user may not. Apple's GPU: zeus. A counter that stands still, as some virtual machines show, is none.

    Args:
        device: What computes.
        powercap: Where Linux shows RAPL.
        sleep: Waits for so many seconds; replaced in tests.

    Example:
        >>> from lightning_prune.profiling.energy_meter import find_counter
        >>> print(find_counter("meta"))
        n/a (no energy counter on this device)
    """
    device = torch.device(device)
    reasons, exists = [], False
    for make in _candidates(device, powercap):
        try:
            counter = make()
        except NoCounterError as error:
            reasons.append(str(error))
            exists = exists or error.exists
            continue
        before = counter.joules()
        sleep(2 * counter.resolution)
        if counter.joules() > before:
            return counter
        reasons.append(f"{counter.name} stands still")
    reason = "; ".join(reasons) or f"none is known for {device.type} devices"
    return Unavailable(NOT_READABLE if exists else NO_COUNTER, reason)


@cache
def device_counter(device: torch.device) -> EnergyCounter | Unavailable:
    """The counter of a device, looked for once in a process."""
    return find_counter(device)


def _candidates(device: torch.device, powercap: Path) -> list[Callable[[], EnergyCounter]]:
    by_zeus: Callable[[], EnergyCounter] = lambda: ZeusCounter(device)  # noqa: E731
    if device.type == "cuda":
        return [by_zeus, lambda: NvmlCounter(device)]
    if device.type == "cpu":
        return [lambda: RaplCounter(powercap), by_zeus]
    return [by_zeus] if device.type == "mps" else []


__all__ = ["NO_COUNTER", "SHORTEST", "EnergyCounter", "EnergyReading", "Unavailable", "find_counter", "measure_energy"]

SHORTEST = 1.0  # seconds; a counter that moves every tenth of a second is then off by a tenth at most


@dataclass(frozen=True)
class EnergyReading:
    """What some work costs.

    Attributes:
        joules_per_image: Over all windows.
        spread: Half the distance between the quartiles of the windows' joules per image.
        watts: Mean power while it worked, what the idle device draws included.
        idle_watts: Mean power just before, with nothing running.
        seconds: Length of all windows together.
        images: Images in them.
        windows: How many there were.
        source: The counter, and so what is counted: a GPU's board, or whole processor packages.
    """

    joules_per_image: float
    spread: float
    watts: float
    idle_watts: float
    seconds: float
    images: int
    windows: int
    source: str


def measure_energy(
    run: Callable[[], object],
    images: int,
    device: torch.device | str,
    counter: EnergyCounter | None = None,
    min_seconds: float = SHORTEST,
    windows: int = 3,
    idle_seconds: float = SHORTEST,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> EnergyReading:
    """Measures what the images of a run cost, time and energy in the same windows.

    First the idle device, with nothing running, then one run that is not counted, then the windows: runs one after
    another, the device waited for after each, as where latency is measured. Counters count everything that their part
    of the machine does, so let nothing else run meanwhile.

    Args:
        run: Does the work once.
        images: How many images that is.
        device: What computes, and is waited for.
        counter: From `find_counter`, which is asked if None.
        min_seconds: Shortest window; at least 1, and ten updates of the counter.
        windows: How many.
        idle_seconds: Length of the idle window; as `min_seconds`.
        clock: Seconds; replaced in tests.
        sleep: Waits for so many seconds; replaced in tests.

    Returns:
        Energy, power and their source.

    Raises:
        ArgumentError: A number is out of range, or there is no counter.
        DataError: The counter did not move during a window, or went back.

    Example:
        >>> from lightning_prune.profiling.energy_meter import measure_energy
        >>> class Meter:  # a device that always draws 40 watts
        ...     name, resolution, now = "meter", 0.1, 0.0
        ...     def joules(self):
        ...         return 40 * self.now
        ...     def wait(self, seconds):
        ...         self.now += seconds
        >>> meter = Meter()
        >>> step = lambda: meter.wait(0.5)
        >>> reading = measure_energy(step, 16, "cpu", meter, clock=lambda: meter.now, sleep=meter.wait)
        >>> reading.joules_per_image, reading.watts, reading.idle_watts
        (1.25, 40.0, 40.0)
    """
    device = torch.device(device)
    if counter is None:
        found = find_counter(device)
        if isinstance(found, Unavailable):
            raise ArgumentError(f"counter: {found} ({found.reason})")
        counter = found
    for name, number in (("images", images), ("windows", windows)):
        if number < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {number}")
    shortest = max(SHORTEST, 10 * counter.resolution)
    for name, seconds in (("min_seconds", min_seconds), ("idle_seconds", idle_seconds)):
        if not shortest <= seconds < float("inf"):
            raise ArgumentError(f"{name}: expected at least {shortest:g} seconds for {counter.name}, got {seconds}")

    synchronize(device)
    idle_joules, idle_time, _ = _window(lambda: sleep(idle_seconds), device, counter, idle_seconds, clock)
    run()
    measured = [_window(run, device, counter, min_seconds, clock) for _ in range(windows)]
    low, high = np.percentile([joules / (runs * images) for joules, _, runs in measured], (25, 75))
    joules = sum(each for each, _, _ in measured)
    seconds = sum(each for _, each, _ in measured)
    worked = images * sum(runs for _, _, runs in measured)
    return EnergyReading(
        joules_per_image=joules / worked,
        spread=float(high - low) / 2,
        watts=joules / seconds,
        idle_watts=idle_joules / idle_time,
        seconds=seconds,
        images=worked,
        windows=windows,
        source=counter.name,
    )


def _window(
    run: Callable[[], object],
    device: torch.device,
    counter: EnergyCounter,
    min_seconds: float,
    clock: Callable[[], float],
) -> tuple[float, float, int]:
    """Joules, seconds and runs of one window, from an idle device to an idle device."""
    synchronize(device)
    before, start, runs = counter.joules(), clock(), 0
    while not runs or clock() - start < min_seconds:
        run()
        synchronize(device)
        runs += 1
    joules, seconds = counter.joules() - before, clock() - start
    if not joules > 0:
        raise DataError(f"{counter.name}: expected it to count, got {joules:g} J in {seconds:.3g} s")
    return joules, seconds, runs
