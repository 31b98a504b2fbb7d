"""The Pareto front of one method: its schedules over all allowed blocks, with predicted latency and accuracy."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import hypot
from typing import TypeVar

import numpy as np

from lightning_prune.planning.candidate_search import Proposal
from lightning_prune.planning.dynamic_program import Solution, optimal_schedules
from lightning_prune.planning.latency_model import LatencyModel, fit_overhead
from lightning_prune.planning.objectives import Column, Objective
from lightning_prune.planning.results import Candidate, pareto_front
from lightning_prune.planning.sensitivity import Table
from lightning_prune.profiling import DENSE_ACCURACY, Estimate, LatencyProfile, LatencyStats
from lightning_prune.profiling.latency_profile import SAVING
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

T = TypeVar("T")


@dataclass(frozen=True)
class FrontTuning:
    """Constants of the choice on a front.

    Attributes:
        latency_step_ratio: Candidates whose latencies differ by less than this share of dense are one choice.
        first_proxies: Candidates whose proxy is measured before the first choice.
        max_proxies: Candidates whose proxy is measured for one choice after that.
        min_gain: A candidate must promise a score higher by this to have its proxy measured.
    """

    latency_step_ratio: float = 0.005
    first_proxies: int = 4
    max_proxies: int = 8
    min_gain: float = 0.002


TUNING = FrontTuning()


class MethodFront:
    """Schedules of one method by predicted latency, and the proxy of those for which it was measured.

    Timings correct the predictions: they improve the estimate of the method's overhead, and the ratio of measured to
    predicted latency is interpolated between the schedules that were timed.

    Args:
        label: Name of the method among the others.
        reduction: The method.
        latency: Predicts the latency of the tokens alone.
        costs: (depth, levels, levels) cost of accuracy, as `optimal_schedules` takes them.
        measure: Measures the proxy of a schedule, relative to dense.
        probed: Schedules with timings, for the overhead.
        clock: Seconds.

    Attributes:
        candidates: Some of the front, from the fastest to dense: of those about as fast the one that costs least.
    """

    def __init__(
        self,
        label: str,
        reduction: Reduction,
        latency: LatencyModel,
        costs: Table,
        measure: Callable[[Reduction, Schedule], Estimate],
        probed: Iterable[tuple[Schedule, LatencyStats]] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.label, self.reduction = label, reduction
        self._latency, self._costs, self._measure, self._clock = latency, costs, measure, clock
        self._probed = list(probed)
        self._timed: dict[tuple[int, ...], tuple[Schedule, LatencyStats]] = {}
        self._proxies: dict[tuple[int, ...], Estimate] = {}
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
        self._timed[candidate.schedule.removed] = candidate.schedule, timing
        self._solve()

    def accuracy(self, candidate: Candidate) -> Estimate:
        """The proxy of a candidate, measured once; 1 for dense."""
        removed = candidate.schedule.removed
        if not candidate.schedule.total_removed:
            return DENSE_ACCURACY
        if removed not in self._proxies:
            self._proxies[removed] = self._measure(self.reduction, candidate.schedule)
            self._proxy_at_cost[candidate.cost] = self._proxies[removed]
        return self._proxies[removed]

    def estimate(self, candidate: Candidate) -> Estimate:
        """The proxy of a candidate; if it was not measured, interpolated between those that cost less and more."""
        if candidate.schedule.removed in self._proxies:
            return self._proxies[candidate.schedule.removed]
        costs = sorted(self._proxy_at_cost)
        known = np.array([self._proxy_at_cost[cost] for cost in costs])
        return Estimate(*(float(np.interp(candidate.cost, costs, column)) for column in known.T))

    def all_candidates(self, chosen: Candidate | None = None) -> list[Candidate]:
        """The whole front from dense to the fastest, and the chosen candidate, with all that was measured.

        Args:
            chosen: May have left the front after a correction.
        """
        found = {c.schedule.removed: c for c in ([chosen] if chosen is not None else []) + self._front}
        return [
            replace(
                candidate.with_accuracy(self.accuracy(candidate)) if self._is_known(candidate) else candidate,
                timing=self._timed.get(candidate.schedule.removed, (None, None))[1],
            )
            for candidate in sorted(found.values(), key=lambda c: -c.ratio)
        ]

    def propose(self, objective: Objective, dense_ms: float, deadline: float) -> Proposal:
        """The best candidate by what is known, with its proxy measured; dense if none is faster and better.

        Args:
            objective: What makes one candidate better than another.
            dense_ms: Latency of the dense model at present.
            deadline: No further proxy is measured after it, except that of one choice.
        """
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
        if not self._proxies:
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
        return candidate.is_dense or candidate.schedule.removed in self._proxies

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

    def _solve(self) -> None:
        """Overhead and front from all timings."""
        overhead = fit_overhead(self._latency, [*self._probed, *self._timed.values()])
        latency = replace(self._latency, overhead=overhead)
        levels = [int(level) for level in latency.levels]
        solutions = optimal_schedules(levels, latency.steps(), self._costs, latency.dense_ms)
        predicted = [latency.predict(schedule) / latency.dense_ms for schedule, _ in self._timed.values()]
        measured = [timing.ratio for _, timing in self._timed.values()]
        self._front = corrected_front(self.label, self.reduction, solutions, levels[-1], predicted, measured)
        self.candidates = thinned(self._front)


def corrected_front(
    label: str,
    reduction: Reduction,
    solutions: Sequence[Solution],
    tokens: int,
    predicted: Sequence[float],
    measured: Sequence[float],
) -> list[Candidate]:
    """The candidates of a front, with latencies corrected by those that were timed.

    The ratio of measured to predicted latency is interpolated between the timed schedules; it is 1 for dense.

    Args:
        label: Name of the method.
        reduction: The method.
        solutions: As `optimal_schedules` returns them, dense first.
        tokens: N.
        predicted: Predicted latency over dense of the timed schedules.
        measured: Measured latency over dense of the same.

    Returns:
        Dense, and those that are faster than all that cost no more, to the fastest.
    """
    dense_ms = solutions[0].milliseconds
    known = sorted([*zip(predicted, measured, strict=True), (1.0, 1.0)])
    at = np.array([before for before, _ in known])
    corrections = np.array([after for _, after in known]) / np.maximum(at, 1e-9)
    candidates = []
    for solution in solutions:
        entering = (tokens, *solution.levels[:-1])
        schedule = Schedule([before - after for before, after in zip(entering, solution.levels, strict=True)])
        ratio = solution.milliseconds / dense_ms
        ratio *= float(np.interp(ratio, at, corrections))
        candidates.append(Candidate(label, reduction, schedule, ratio, solution.cost))
    dense, *others = candidates
    dense = replace(dense, accuracy=1.0)
    return [dense, *(c for c in pareto_front(others, lambda c: (c.cost, c.ratio)) if c.ratio < dense.ratio)]


def thinned(front: Sequence[Candidate]) -> list[Candidate]:
    """A selection of a front, from the fastest to dense: in each half percent of latency the one that costs least.

    Args:
        front: From dense to the fastest; the fastest is always selected.
    """
    bins = {int((1 - c.ratio) / TUNING.latency_step_ratio): c for c in reversed(front[1:])}
    return list({c.schedule.removed: c for c in (front[-1], *bins.values(), front[0])}.values())


def evenly_spaced(items: Sequence[T], number: int) -> list[T]:
    """At most `number` of the items at even distances, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[place] for place in dict.fromkeys(places.tolist())]


def missed_budget(objective: Objective, dense_ms: float) -> str:
    """A sentence for the reason if dense misses a budget; empty if it does not."""
    return "" if objective.dense_is_feasible(dense_ms) else f" The {objective} is not met."


def dense_reason(profile: LatencyProfile) -> str | None:
    """Why no token count of a latency curve is worth having; None if one is.

    Args:
        profile: The curve.
    """
    if any(profile.is_faster_than_dense(count) for count in profile.tokens):
        return None
    fastest = profile.tokens[int(np.argmin(profile.milliseconds))]
    gained = 1 - profile.latency_ms(fastest) / profile.dense_ms
    if gained <= SAVING:
        closest = f"{fastest} tokens, by {100 * gained:.1f}%" if fastest < profile.dense_tokens else "dense itself"
        return (
            f"The curve is flat: no measured count is faster than dense by more than {SAVING:.0%} (the fastest is "
            f"{closest}). Pruning would cost accuracy for nothing."
        )
    noise = 2 * hypot(profile.stderr_ms(fastest), profile.stderr_ms(profile.dense_tokens)) / profile.dense_ms
    return (
        f"The measurement is too noisy to choose by: {fastest} tokens seem {100 * gained:.1f}% faster than dense, "
        f"within a noise of {100 * noise:.0f}%. Stop other programs on this machine, or raise `time_limit`."
    )
