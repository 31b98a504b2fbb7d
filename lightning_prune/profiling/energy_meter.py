"""Energy of repeated work, in joules per image and watts."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lightning_prune._utils.device import synchronize
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.profiling.energy_counter import EnergyCounter, Unavailable, find_counter

SHORTEST_WINDOW = 1.0
"""Seconds. A counter that is updated every tenth of a second is then off by a tenth at most."""


@dataclass(frozen=True)
class EnergyReading:
    """Energy and power of repeated work.

    Attributes:
        joules_per_image: Over all windows.
        spread: Half the interquartile range of the windows' joules per image.
        watts: Mean power during the work, including what the idle device draws.
        idle_watts: Mean power just before, with nothing running.
        seconds: Length of all windows together.
        images: Images in them.
        windows: Number of windows.
        source: Name of the counter, and so what is counted: a GPU's board, or whole processor packages.
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
    min_seconds: float = SHORTEST_WINDOW,
    windows: int = 3,
    idle_seconds: float = SHORTEST_WINDOW,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> EnergyReading:
    """Measures energy per image and power in the same windows.

    An idle window is measured first, then one run that is not counted, then the windows: runs one after another, with
    the device synchronised after each. A counter includes everything that its part of the machine does, so nothing
    else should run meanwhile.

    Args:
        run: Does the work once.
        images: Images in one run.
        device: The device that computes; it is synchronised.
        counter: The counter to read; None takes that of `find_counter`.
        min_seconds: Shortest window; at least 1 second and ten updates of the counter.
        windows: Number of windows.
        idle_seconds: Length of the idle window, bounded as `min_seconds`.
        clock: Returns seconds.
        sleep: Waits for the given number of seconds.

    Returns:
        Energy, power and their source.

    Raises:
        ArgumentError: If a number is out of range, or the device has no counter.
        DataError: If the counter did not rise during a window.

    Example:
        >>> from lightning_prune.profiling.energy_meter import measure_energy
        >>> class Meter:  # a device that always draws 40 watts
        ...     name, resolution, now = "meter", 0.1, 0.0
        ...     def begin(self, window):
        ...         self.start = self.now
        ...     def end(self, window):
        ...         return 40 * (self.now - self.start)
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
            raise ArgumentError(f"`counter` must be given for this device, got None: {found} ({found.reason}).")
        counter = found
    for name, number in (("images", images), ("windows", windows)):
        if number < 1:
            raise ArgumentError(f"`{name}` must be at least 1, got {number}.")
    shortest = max(SHORTEST_WINDOW, 10 * counter.resolution)
    for name, seconds in (("min_seconds", min_seconds), ("idle_seconds", idle_seconds)):
        if not shortest <= seconds < float("inf"):
            raise ArgumentError(f"`{name}` must be at least {shortest:g} seconds for {counter.name}, got {seconds}.")

    synchronize(device)
    idle_joules, idle_time, _ = _window(lambda: sleep(idle_seconds), device, counter, idle_seconds, clock)
    run()
    measured = [_window(run, device, counter, min_seconds, clock) for _ in range(windows)]
    low, high = np.percentile([joules / (runs * images) for joules, _, runs in measured], (25, 75))
    joules = sum(part for part, _, _ in measured)
    seconds = sum(part for _, part, _ in measured)
    total_images = images * sum(runs for _, _, runs in measured)
    return EnergyReading(
        joules_per_image=joules / total_images,
        spread=float(high - low) / 2,
        watts=joules / seconds,
        idle_watts=idle_joules / idle_time,
        seconds=seconds,
        images=total_images,
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
    counter.begin("measure")
    start, runs = clock(), 0
    while not runs or clock() - start < min_seconds:
        run()
        synchronize(device)
        runs += 1
    joules, seconds = counter.end("measure"), clock() - start
    if not joules > 0:
        raise DataError(f"The energy counter {counter.name} must rise, got {joules:g} J in {seconds:.3g} s.")
    return joules, seconds, runs
