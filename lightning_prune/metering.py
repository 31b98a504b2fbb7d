"""The energy of a whole run over the data, where its device has a counter."""

import time
from collections.abc import Callable
from typing import NamedTuple

import lightning as L

from lightning_prune.profiling.counter_search import device_counter
from lightning_prune.profiling.energy import SHORTEST, EnergyCounter, Unavailable

_WRAP = 30.0  # seconds; RAPL starts again from 0 after minutes, so it is read more often than that


class Metered(NamedTuple):
    """Energy, images and seconds of a window, as `lightning_prune.metrics.Energy` takes them."""

    joules: float
    images: int
    seconds: float


class EnergyMeter:
    """Counts from the first batch after warm-up to the end of the run, loading included.

    A run that is shorter than a second after its warm-up tells nothing: counters move every tenth of a second.

    Args:
        counter: Counts the energy; None for a process that shares its counter with another one, which counts.
        warmup: How many batches at the start do not count.
        agree: Whether all processes of the run say so; they must log alike.
        clock: Seconds; replaced in tests.
    """

    def __init__(
        self,
        counter: EnergyCounter | None,
        warmup: int,
        agree: Callable[[bool], bool] = bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._counter = counter
        self._warmup = warmup
        self._agree = agree
        self._clock = clock
        self._batches = self._images = 0
        self._start = self._read_at = self._joules = 0.0

    def begin(self, images: int) -> None:
        """A batch begins, on an idle device."""
        now = self._clock()
        if self._batches == self._warmup:
            self._start, self._joules = now, self._read()
        elif self._batches > self._warmup and now - self._read_at > _WRAP:
            self._read()
        self._images += images if self._batches >= self._warmup else 0
        self._batches += 1

    def finish(self) -> Metered | None:
        """Ends the run; None where any process has nothing to tell."""
        joules = self._read() - self._joules
        seconds = self._clock() - self._start if self._images else 0.0
        counted = self._counter is None or joules > 0
        return Metered(joules, self._images, seconds) if self._agree(seconds >= SHORTEST and counted) else None

    def _read(self) -> float:
        self._read_at = self._clock()
        return 0.0 if self._counter is None else self._counter.joules()


def meter_of(trainer: L.Trainer, warmup: int) -> EnergyMeter | None:
    """The meter of a run by `trainer`; None where the device of any of its processes has no counter."""
    device = trainer.strategy.root_device
    found = device_counter(device)
    counter = None if isinstance(found, Unavailable) else found
    if not trainer.strategy.reduce_boolean_decision(counter is not None, all=True):
        return None
    # The processes of one machine share its processor: the first counts for all.
    shares = device.type == "cpu" and trainer.local_rank > 0
    return EnergyMeter(None if shares else counter, warmup, trainer.strategy.reduce_boolean_decision)
