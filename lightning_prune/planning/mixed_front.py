"""The Pareto front of schedules whose blocks reduce by different methods."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.candidates import MIXED, Proposal
from lightning_prune.planning.dynamic_program import Solution
from lightning_prune.planning.method_front import Front, MethodFront
from lightning_prune.planning.mixed_latency import MethodOf, MixedLatency, TimedSchedule
from lightning_prune.planning.objectives import Objective
from lightning_prune.profiling import DENSE_ACCURACY, Estimate
from lightning_prune.reduction import Reduction, resolve, spec_of
from lightning_prune.schedule import MethodSpec, Schedule

_MIN_GAIN = 0.0005  # of the score, by predictions alone, for which the first proxy is measured


class MixedFront(Front):
    """Schedules of at least two methods, by what is known of each method alone.

    Latencies and divergences of blocks add up whatever their methods are, so that nothing has to be measured to find
    the front. `resize` takes the place of the method of block 0, before which it acts, and the others go on from the
    counts of its grids in later blocks. The candidates are proposed only where they promise more than those of a single
    method: their proxies are then measured, and they are timed, as all others are.

    Args:
        fronts: At least two of methods with a name that finds them again; see `combinable`.
        measure: Measures the proxy of a schedule, relative to dense.
        clock: Seconds.
    """

    def __init__(
        self,
        fronts: Sequence[MethodFront],
        measure: Callable[[Reduction | None, Schedule], Estimate],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._fronts = self.others = fronts
        specs = [spec_of(front.reduction) for front in fronts]
        self._places = {spec: place for place, spec in enumerate(specs)}
        latency = MixedLatency(
            tuple(front.latency.models[0] for front in fronts), tuple(front.latency.weighs[0] for front in fronts)
        )
        costs = np.concatenate([front.costs for front in fronts], axis=1)
        super().__init__(MIXED, None, latency, costs, measure, (), clock, specs)

    def propose(self, objective: Objective, dense_ms: float, deadline: float) -> Proposal | None:
        """The best candidate by what is known; None if none promises more than those of a single method.

        Args:
            objective: What makes one candidate better than another.
            dense_ms: Latency of the dense model at present.
            deadline: As of `Front.propose`.
        """
        if len(self._timed_by_others()) != len(self._probed):
            self._solve()
        if len(self.candidates) == 1 or not (self._proxies or self._promises_more(objective, dense_ms)):
            return None
        return super().propose(objective, dense_ms, deadline)

    def _promises_more(self, objective: Objective, dense_ms: float) -> bool:
        """Whether a candidate is better than those of single methods, all by the same predictions."""
        own = [candidate for candidate in self.candidates if not candidate.is_dense]
        others = [c for front in self._fronts for c in front.candidates if not c.is_dense]
        known = self._known_proxies()
        costs, values = list(known), [estimate.value for estimate in known.values()]
        predicted = [Estimate(float(np.interp(c.cost, costs, values)), 0.0) for c in own + others]
        ratios = np.array([*(c.ratio for c in own + others), 1.0])
        scores = objective.score(dense_ms * ratios, objective.judged([*predicted, DENSE_ACCURACY]))
        best = max(scores[len(own) :])
        return bool(max(scores[: len(own)]) > best + _MIN_GAIN)

    def _timed_by_others(self) -> list[TimedSchedule]:
        """What the fronts of the methods know of latencies."""
        return [
            timed._replace(methods=[place] * timed.schedule.depth)
            for place, front in enumerate(self._fronts)
            for timed in front.timed
        ]

    def _solve(self) -> None:
        self._probed = self._timed_by_others()
        super()._solve()

    def _methods_of(self, schedule: Schedule) -> MethodOf:
        named = schedule.methods
        return [self._places[named[block]] if block in named else None for block in range(schedule.depth)]

    def _wanted(self, solutions: list[Solution]) -> list[Solution]:
        """Dense, and those of several methods: the others are on the front of their method."""
        return [s for s in solutions if len(set(s.methods) - {None}) > 1 or s is solutions[0]]


def combinable(fronts: Sequence[MethodFront], pools_patches: bool = False) -> list[MethodFront]:
    """The fronts of methods that blocks of one schedule can use.

    A schedule names the method of a block, so that only methods that a name finds again can be in it.

    Args:
        fronts: Of all methods, the preferred one first.
        pools_patches: Whether the model pools over its patch tokens: those that merge tokens then cannot be combined
            with those that drop them.
    """
    found = [front for front in fronts if _is_found_again(front.reduction)]
    if any("pixels" in front.reduction.reads for front in found):
        found = [front for front in found if not front.reduction.scales_images]
    if pools_patches:
        merges = next((f.reduction.is_lossless for f in found if not f.reduction.scales_images), False)
        found = [f for f in found if f.reduction.scales_images or f.reduction.is_lossless == merges]
    return found


def _is_found_again(reduction: Reduction) -> bool:
    try:
        spec: MethodSpec = spec_of(reduction)
        return resolve(spec) == reduction
    except (ArgumentError, TypeError):  # a class without a name, or a setting that no file can hold
        return False
