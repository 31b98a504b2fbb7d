"""Joules per image and watts, measured by a counter of the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lightning_prune.device import synchronize
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.profiling.counter_search import NO_COUNTER, Unavailable, find_counter
from lightning_prune.profiling.counters import EnergyCounter

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
        >>> from lightning_prune.profiling.energy import measure_energy
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
