"""Methods whose schedules have known latencies and proxies, and a device that times them: no model is run."""

from typing import NamedTuple

import numpy as np

from lightning_prune.planning.candidate_search import CandidateSearch, run_searches
from lightning_prune.planning.latency_model import NO_OVERHEAD, LatencyModel
from lightning_prune.planning.method_front import MethodFront
from lightning_prune.profiling import Estimate, LatencyStats
from lightning_prune.reduction import resolve

N, DEPTH = 17, 4
DENSE_MS = float(DEPTH * N)
LEVELS = np.arange(5, N + 1)


def latency(overhead=NO_OVERHEAD):
    """A block takes a millisecond a token, 0.4 of it before the cut."""
    return LatencyModel(LEVELS, (LEVELS - N).astype(float), DENSE_MS, DEPTH, 0.4, overhead)


def ratio(schedule, overhead=NO_OVERHEAD):
    return latency(overhead).predict(schedule) / DENSE_MS


def costs(most=N):
    """Earlier blocks are more sensitive; a method that can remove few has steps that are not allowed."""
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
        known = proxy(schedule)
        return known if isinstance(known, Estimate) else Estimate(known, 0.0)

    return MethodFront(name, resolve(name), latency(), costs(most), measure, probed), asked


class Run(NamedTuple):
    """What was timed together: method -> what it removed, and its latency over dense."""

    removed: dict[str, tuple[int, ...]]
    ratios: dict[str, float]


class Device:
    """Times schedules by a function of method and schedule; `slower` is the factor of its speed since profiling.

    Args:
        truth: Latency over dense of a method and a schedule.
        slower: Factor of all latencies, dense as well.
        seconds: What a run takes on the clock.
    """

    def __init__(self, truth=lambda method, schedule: ratio(schedule), slower=1.0, seconds=0.0):
        self.truth, self.slower, self.seconds = truth, slower, seconds
        self.runs, self.now = [], 0.0

    def clock(self):
        return self.now

    def time_candidates(self, candidates):
        self.now += self.seconds
        dense_ms = DENSE_MS * self.slower
        ratios = {c.key: self.truth(c.method, c.schedule) for c in candidates}
        self.runs.append(
            Run(
                {c.method: c.schedule.removed for c in candidates},
                dict(zip([c.method for c in candidates], ratios.values(), strict=True)),
            )
        )
        return timing(1.0, dense_ms), {key: timing(value, dense_ms) for key, value in ratios.items()}

    def search(self, fronts, objective, time_limit=60.0):
        """The result of a search."""
        search = CandidateSearch(objective, fronts, DENSE_MS * self.slower, "proxy")
        run_searches([search], self.time_candidates, self.now + time_limit, clock=self.clock)
        return search.result()
