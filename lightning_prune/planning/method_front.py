"""The Pareto front of one method: its schedules over all allowed blocks, with predicted latency and accuracy."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from lightning_prune.planning.candidates import Candidate, Proposal
from lightning_prune.planning.dynamic_program import Solution, optimal_schedules
from lightning_prune.planning.front_candidates import corrected_front, evenly_spaced, thinned
from lightning_prune.planning.latency_model import LatencyModel
from lightning_prune.planning.mixed_latency import MethodOf, MixedLatency, TimedSchedule, fit_overheads
from lightning_prune.planning.objectives import Column, Objective
from lightning_prune.planning.reasons import missed_budget
from lightning_prune.planning.sensitivity import Table
from lightning_prune.profiling import DENSE_ACCURACY, Estimate, LatencyStats
from lightning_prune.profiling.latency_profile import SAVING
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import MethodSpec, Schedule


@dataclass(frozen=True)
class FrontTuning:
    """Constants of the choice on a front.

    Attributes:
        first_proxies: Candidates whose proxy is measured before the first choice.
        max_proxies: Candidates whose proxy is measured for one choice after that.
        min_gain: A candidate must promise a score higher by this to have its proxy measured.
        cost_ratio: Share of its predicted cost that a candidate may turn out to have, of a method of which no proxy is
            known yet. Measured divergences of schedules were within a factor of two of the predicted ones.
    """

    first_proxies: int = 4
    max_proxies: int = 8
    min_gain: float = 0.002
    cost_ratio: float = 0.5


TUNING = FrontTuning()


class Front(ABC):
    """Schedules of one or more methods by predicted latency, and the proxy of those for which it was measured.

    Timings correct the predictions: they improve the estimates of the overheads, and the ratio of measured to predicted
    latency is interpolated between the schedules that were timed.

    Args:
        label: Name of the front among the others.
        reduction: The method; None where blocks have different ones.
        latency: Predicts the latency of the tokens alone.
        costs: (depth, methods, levels, levels) cost of accuracy, as `optimal_schedules` takes them.
        measure: Measures the proxy of a schedule, relative to dense.
        probed: Schedules with timings, for the overheads.
        clock: Seconds.
        specs: The methods, where blocks have different ones.

    Attributes:
        candidates: Some of the front, from the fastest to dense: of those about as fast the one that costs least.
        others: The fronts before this one, whose measured proxies say what a predicted cost means. If there are any
            with proxies, this one measures none unless it may have a better candidate.
    """

    others: Sequence["Front"] = ()

    def __init__(
        self,
        label: str,
        reduction: Reduction | None,
        latency: MixedLatency,
        costs: Table,
        measure: Callable[[Reduction | None, Schedule], Estimate],
        probed: Iterable[TimedSchedule] = (),
        clock: Callable[[], float] = time.perf_counter,
        specs: Sequence[MethodSpec] = (),
    ) -> None:
        self.label, self.reduction, self._specs = label, reduction, specs
        self.latency, self.costs, self._measure, self._clock = latency, costs, measure, clock
        self._probed = list(probed)
        self._timed: dict[Schedule, TimedSchedule] = {}
        self._proxies: dict[Schedule, Estimate] = {}
        self._proxy_at_cost: dict[float, Estimate] = {0.0: DENSE_ACCURACY}
        self._front: list[Candidate] = []
        self.candidates: list[Candidate] = []
        self._solve()

    @property
    def dense(self) -> Candidate:
        """The schedule that removes nothing."""
        return self._front[0]

    def fastest(self) -> Candidate:
        """The candidate with the smallest predicted latency."""
        return self.candidates[0]

    def observe(self, candidate: Candidate, timing: LatencyStats) -> None:
        """Corrects the predictions by a timing."""
        schedule = candidate.schedule
        self._timed[schedule] = TimedSchedule(schedule, self._methods_of(schedule), timing)
        self._solve()

    def accuracy(self, candidate: Candidate) -> Estimate:
        """The proxy of a candidate, measured once; 1 for dense."""
        schedule = candidate.schedule
        if not schedule.total_removed:
            return DENSE_ACCURACY
        if schedule not in self._proxies:
            self._proxies[schedule] = self._measure(self.reduction, schedule)
            self._proxy_at_cost[candidate.cost] = self._proxies[schedule]
        return self._proxies[schedule]

    def estimate(self, candidate: Candidate) -> Estimate:
        """The proxy of a candidate; if it was not measured, interpolated between those that cost less and more."""
        if candidate.schedule in self._proxies:
            return self._proxies[candidate.schedule]
        known = self._known_proxies()
        columns = np.array([*known.values()]).T
        return Estimate(*(float(np.interp(candidate.cost, [*known], column)) for column in columns))

    def _known_proxies(self) -> dict[float, Estimate]:
        """Predicted cost, ascending -> proxy, of the schedules for which that was measured.

        Those of other methods, too, as long as there are few of this one: the proxy then falls with the cost.
        """
        if len(self._proxies) >= TUNING.first_proxies or not any(other._proxies for other in self.others):
            return {cost: self._proxy_at_cost[cost] for cost in sorted(self._proxy_at_cost)}
        from scipy.optimize import isotonic_regression  # slow to import

        known = dict(chain.from_iterable(other._proxy_at_cost.items() for other in self.others)) | self._proxy_at_cost
        costs = sorted(known)
        values = isotonic_regression([known[cost].value for cost in costs], increasing=False).x
        return {cost: known[cost]._replace(value=float(value)) for cost, value in zip(costs, values, strict=True)}

    def _may_be_best(self, objective: Objective, dense_ms: float) -> bool:
        """Whether a candidate may be better than those of others whose proxies are known."""
        own = [candidate for candidate in self.candidates if not candidate.is_dense]
        others = [(f, c) for f in self.others for c in f.candidates if not c.is_dense and f._is_known(c)]
        if not own or not others:
            return True
        known = self._known_proxies()
        values = [estimate.value for estimate in known.values()]
        at = np.array([c.cost for c in own]) * TUNING.cost_ratio
        hoped = [Estimate(float(value), 0.0) for value in np.interp(at, [*known], values)]
        estimates = [*hoped, *(f.accuracy(c) for f, c in others), DENSE_ACCURACY]
        ratios = np.array([*(c.ratio for c in own), *(c.ratio for _, c in others), 1.0])
        scores = objective.score(dense_ms * ratios, objective.judged(estimates))
        return bool(scores[: len(own)].max() > max(scores[len(own) :]))

    def all_candidates(self, chosen: Candidate | None = None) -> list[Candidate]:
        """The whole front from dense to the fastest, and the chosen candidate, with all that was measured.

        Args:
            chosen: May have left the front after a correction.
        """
        found = {c.schedule: c for c in ([chosen] if chosen is not None else []) + self._front}
        timings = {schedule: timed.timing for schedule, timed in self._timed.items()}
        return [
            replace(
                candidate.with_accuracy(self.accuracy(candidate)) if self._is_known(candidate) else candidate,
                timing=timings.get(candidate.schedule),
            )
            for candidate in sorted(found.values(), key=lambda c: -c.ratio)
        ]

    def propose(self, objective: Objective, dense_ms: float, deadline: float) -> Proposal | None:
        """The best candidate by what is known, with its proxy measured; dense if none is faster and better.

        Args:
            objective: What makes one candidate better than another.
            dense_ms: Latency of the dense model at present.
            deadline: No further proxy is measured after it, except that of one choice.

        Returns:
            The proposal; None if other fronts are known to have a better candidate than this one can be hoped to have.
        """
        if not self._proxies and not self._may_be_best(objective, dense_ms):
            return None
        reason = objective.infeasible_reason(dense_ms * np.array([c.ratio for c in self.candidates]))
        if reason is not None:
            return Proposal(self.fastest(), reason, feasible=False)
        missed = missed_budget(objective, dense_ms)
        faster = [candidate for candidate in self.candidates if candidate.ratio < 1 - SAVING]
        candidates = [*faster, self.dense]
        milliseconds = dense_ms * np.array([candidate.ratio for candidate in candidates])
        if not faster or objective.infeasible_reason(milliseconds) is not None:
            gained = 100 * (1 - self.fastest().ratio)
            return Proposal(
                self.dense,
                f"No schedule is predicted to be faster than dense by more than {SAVING:.0%}; the fastest by "
                f"{gained:.1f}%, its overhead included.{missed}",
            )
        if not self._proxies and not any(other._proxies for other in self.others):
            for candidate in evenly_spaced(faster, TUNING.first_proxies):
                if self._clock() < deadline:
                    self.accuracy(candidate)
        for attempt in range(TUNING.max_proxies):
            promising = self._promising(candidates, milliseconds, objective)
            if promising is None or (attempt and self._clock() >= deadline):
                break
            self.accuracy(promising)
        places = [i for i, candidate in enumerate(candidates) if self._is_known(candidate)]
        accuracy = objective.judged([self.accuracy(candidates[place]) for place in places])
        chosen = candidates[places[objective.best(milliseconds[places], accuracy)]]
        if chosen.is_dense:
            return Proposal(
                chosen, f"Dense is best by the objective ({objective}): every faster schedule costs too much.{missed}"
            )
        return Proposal(chosen)

    def _is_known(self, candidate: Candidate) -> bool:
        """Whether the proxy of a candidate is known."""
        return candidate.is_dense or candidate.schedule in self._proxies

    def _promising(
        self, candidates: Sequence[Candidate], milliseconds: Column, objective: Objective
    ) -> Candidate | None:
        """The candidate whose proxy to measure next: the best by the estimates, then one in a gap next to the best.

        Between measured candidates the proxy is interpolated. It is usually better, but hardly better than that of the
        next slower measured one: a gap is entered as long as even this would make a difference.
        """
        estimates = objective.judged([self.estimate(candidate) for candidate in candidates])
        best = objective.best(milliseconds, estimates)
        if not self._is_known(candidates[best]):
            return candidates[best]
        known = [i for i, candidate in enumerate(candidates) if self._is_known(candidate)]
        place = known.index(best)
        for faster, slower in ((place - 1, place), (place, place + 1)):
            if faster < 0 or slower >= len(known):
                continue
            gap = np.arange(known[faster] + 1, known[slower])
            optimistic = estimates.copy()
            optimistic[gap] = estimates[known[slower]]
            scores = objective.score(milliseconds, optimistic)
            if len(gap) and scores[gap].max() > scores[best] + TUNING.min_gain:
                return candidates[gap[len(gap) // 2]]
        return None

    @abstractmethod
    def _methods_of(self, schedule: Schedule) -> MethodOf:
        """Of each block of a candidate's schedule, the index of its method."""

    def _wanted(self, solutions: list[Solution]) -> list[Solution]:
        """The solutions that become candidates, dense first."""
        return solutions

    def _solve(self) -> None:
        """Overheads and front from all timings."""
        latency = fit_overheads(self.latency, [*self._probed, *self._timed.values()])
        levels = [int(level) for level in latency.models[0].levels]
        solutions = optimal_schedules(levels, latency.steps(), self.costs, latency.dense_ms, latency.weighs)
        predicted = [latency.predict(each.schedule, each.methods) / latency.dense_ms for each in self._timed.values()]
        measured = [each.timing.ratio for each in self._timed.values()]
        wanted = self._wanted(solutions)
        self._front = corrected_front(self.label, self.reduction, wanted, levels[-1], predicted, measured, self._specs)
        self.candidates = thinned(self._front)


class MethodFront(Front):
    """The front of one method.

    Args:
        label: Name of the method among the others.
        reduction: The method.
        latency: Predicts the latency of the tokens alone.
        costs: (depth, levels, levels) cost of accuracy.
        measure: Measures the proxy of a schedule, relative to dense.
        probed: Schedules with timings, for the overhead.
        clock: Seconds.
    """

    reduction: Reduction

    def __init__(
        self,
        label: str,
        reduction: Reduction,
        latency: LatencyModel,
        costs: Table,
        measure: Callable[[Reduction | None, Schedule], Estimate],
        probed: Iterable[tuple[Schedule, LatencyStats]] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        weighs = reduction.tracks_sizes and reduction.proportional_attention
        timed = [TimedSchedule(schedule, self._methods_of(schedule), timing) for schedule, timing in probed]
        mixed = MixedLatency((latency,), (weighs,))
        super().__init__(label, reduction, mixed, costs[:, None], measure, timed, clock)

    @property
    def timed(self) -> list[TimedSchedule]:
        """All schedules of the method with timings: the probes, and the candidates."""
        return [*self._probed, *self._timed.values()]

    def _methods_of(self, schedule: Schedule) -> MethodOf:
        return [0] * schedule.depth
