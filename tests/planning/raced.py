"""Methods whose every schedule has a known latency and proxy, and a search that times them: no model is run."""

from typing import NamedTuple

import numpy as np

from lightning_prune.planning.latency_model import FREE, LatencyModel
from lightning_prune.planning.multi_block import MethodFront
from lightning_prune.profiling import LatencyProfile, LatencyStats
from lightning_prune.reduction import resolve

N, DEPTH = 17, 4
DENSE_MS = float(DEPTH * N)
LEVELS = np.arange(5, N + 1)


def latency(price=FREE):
    """A block takes a millisecond a token, 0.4 of it before the cut."""
    return LatencyModel(LEVELS, (LEVELS - N).astype(float), DENSE_MS, DEPTH, 0.4, price)


def ratio(schedule, price=FREE):
    return latency(price).predict(schedule) / DENSE_MS


def costs(most=N):
    """Earlier blocks mind more; a method that can remove few has steps that are not allowed."""
    removed = np.maximum(LEVELS[:, None] - LEVELS[None, :], 0).astype(float)
    allowed = (LEVELS[None, :] <= LEVELS[:, None]) & (removed <= most)
    return np.array([np.where(allowed, (DEPTH - block) * removed**1.5 / 100, np.inf) for block in range(DEPTH)])


def timing(of_dense, dense_ms=DENSE_MS, rounds=31):
    return LatencyStats(of_dense * dense_ms, 0.01, of_dense, 0.0005 if rounds > 1 else 0.0, rounds)


def front(name, proxy=lambda schedule: 1 - schedule.total_removed / 60, probed=(), most=N):
    """A method, and the schedules that its proxy was measured for."""
    asked = []

    def measure(reduction, schedule):
        assert reduction == resolve(name)
        asked.append(schedule.removed)
        return proxy(schedule)

    return MethodFront(resolve(name), name, latency(), costs(most), measure, "proxy", probed), asked


class Run(NamedTuple):
    """What was timed together: method -> what it removed, and its latency over dense."""

    removed: dict[str, tuple[int, ...]]
    ratios: dict[str, float]


class Search:
    """Times schedules by a function of method and schedule, on a machine that may have become slower by a factor."""

    curve = LatencyProfile(
        tuple(LEVELS.tolist()),
        tuple(float(DEPTH * count) for count in LEVELS),
        (0.001,) * len(LEVELS),
        (31,) * len(LEVELS),
        "random",
        0,
        DEPTH,
    )
    time_limit = 30.0

    def __init__(self, truth=lambda method, schedule: ratio(schedule), slower=1.0, foreign=False):
        self.truth, self.slower, self.foreign, self.runs = truth, slower, foreign, []
        self.dense_ms = DENSE_MS

    def compare(self, variants):
        self.dense_ms = DENSE_MS * self.slower
        others = {name: variant for name, variant in variants.items() if variant is not None}
        ratios = {name: self.truth(reduction.name, schedule) for name, (reduction, schedule) in others.items()}
        self.runs.append(Run({name: schedule.removed for name, (_, schedule) in others.items()}, ratios))
        return {name: timing(value, self.dense_ms) for name, value in {"dense": 1.0, **ratios}.items()}
