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
        first_proxies: Candidates whose proxy is measured before the first choice, at most.
        max_proxies: Candidates whose proxy is measured for one choice after that.
        max_misses: Candidates whose proxy is measured for one choice while none is better than those of other fronts.
        min_gain: A candidate must promise a score higher by this to have its proxy measured.
        cost_ratio: Share of its predicted cost that a candidate may turn out to have, if no proxy of its method is
            known yet. Measured divergences of schedules were within a factor of two of the predicted ones.
        min_fall_per_nat: By how much the proxy is taken to fall at least, beyond the costs for which it is known. A ViT
            on CIFAR-10 lost 0.024 of its top-1 at a divergence of 0.1 nats, and 0.054 at 0.2.
    """

    first_proxies: int = 4
    max_proxies: int = 8
    max_misses: int = 2
    min_gain: float = 0.002
    cost_ratio: float = 0.5
    min_fall_per_nat: float = 0.25


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

    def cautious_estimate(self, candidate: Candidate) -> Estimate:
        """As `estimate`, but no better than dense, and worse beyond the costs for which a proxy is known.

        There it falls with the cost as it fell up to there, and by at least `min_fall_per_nat`.
        """
        found = self.estimate(candidate)
        if candidate.schedule not in self._proxies:
            known = self._known_proxies()
            last = max(known)
            fall = max((1 - known[last].value) / last if last else 0.0, TUNING.min_fall_per_nat)
            found = found._replace(value=found.value - fall * max(candidate.cost - last, 0.0))
        return found._replace(value=min(max(found.value, 0.0), 1.0))

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
        return not own or not self._of_others() or self._hoped_for(own, objective, dense_ms) is not None

    def _of_others(self) -> list[tuple["Front", Candidate]]:
        """The candidates of other fronts whose proxies are known, dense left out."""
        return [(f, c) for f in self.others for c in f.candidates if not c.is_dense and f.knows(c)]

    def _hoped_for(self, own: Sequence[Candidate], objective: Objective, dense_ms: float) -> Candidate | None:
        """The best candidate if each had only a share of its predicted cost; None if that is no better than others.

        Args:
            own: Candidates of this front, at least one, without dense.
            objective: What makes one candidate better than another.
            dense_ms: Latency of the dense model at present.
        """
        others = self._of_others()
        known = self._known_proxies()
        values = [estimate.value for estimate in known.values()]
        at = np.array([c.cost for c in own]) * TUNING.cost_ratio
        hoped = [Estimate(float(value), 0.0) for value in np.interp(at, [*known], values)]
        estimates = [*hoped, *(f.accuracy(c) for f, c in others), DENSE_ACCURACY]
        ratios = np.array([*(c.ratio for c in own), *(c.ratio for _, c in others), 1.0])
        scores = objective.score(dense_ms * ratios, objective.judged(estimates))
        best = int(scores[: len(own)].argmax())
        return own[best] if scores[best] > max(scores[len(own) :]) else None

    def all_candidates(self, chosen: Candidate | None = None) -> list[Candidate]:
        """The whole front from dense to the fastest, and the chosen candidate, with all that was measured.

        Args:
            chosen: May have left the front after a correction.
        """
        found = {c.schedule: c for c in ([chosen] if chosen is not None else []) + self._front}
        timings = {schedule: timed.timing for schedule, timed in self._timed.items()}
        return [
            replace(
                candidate.with_accuracy(self.accuracy(candidate)) if self.knows(candidate) else candidate,
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
        candidates = self._not_beaten(candidates, objective, dense_ms)
        if not self._proxies and len(candidates) == 1:
            return None
        milliseconds = dense_ms * np.array([candidate.ratio for candidate in candidates])
        if not self._proxies and not any(other._proxies for other in self.others):
            self._measure_first(candidates, milliseconds, objective, deadline)
        tries = TUNING.max_misses if self._of_others() else TUNING.max_proxies
        for attempt in range(TUNING.max_proxies):
            promising = self._promising(candidates, milliseconds, objective)
            if promising is None and not self._proxies and len(candidates) > 1:  # dense, by what others lose
                promising = self._hoped_for(candidates[:-1], objective, dense_ms)
            is_over = attempt and self._clock() >= deadline
            if (
                promising is None
                or is_over
                or (attempt >= tries and self._best_known(candidates, objective, dense_ms).is_dense)
            ):
                break
            self.accuracy(promising)
        chosen = self._best_known(candidates, objective, dense_ms)
        if chosen.is_dense:
            return Proposal(
                chosen, f"Dense is best by the objective ({objective}): every faster schedule costs too much.{missed}"
            )
        return Proposal(chosen)

    def _best_known(self, candidates: Sequence[Candidate], objective: Objective, dense_ms: float) -> Candidate:
        """The best of the candidates whose proxies are known, dense among them."""
        known = [candidate for candidate in candidates if self.knows(candidate)]
        ratios = np.array([candidate.ratio for candidate in known])
        return known[objective.best(dense_ms * ratios, objective.judged([self.accuracy(c) for c in known]))]

    def _not_beaten(self, candidates: list[Candidate], objective: Objective, dense_ms: float) -> list[Candidate]:
        """The candidates whose proxy is known, and those that would be better than all others if they lost nothing.

        Under an accuracy budget, none that is slower than the fastest of another method that is known to meet it.

        Args:
            candidates: Of this front, dense last.
            objective: What makes one candidate better than another.
            dense_ms: Latency of the dense model at present.
        """
        others = self._of_others()
        if not others:
            return candidates
        hoped = [self.accuracy(c) if self.knows(c) else DENSE_ACCURACY for c in candidates[:-1]]
        estimates = [*hoped, *(f.accuracy(c) for f, c in others), DENSE_ACCURACY]
        ratios = np.array([*(c.ratio for c in candidates[:-1]), *(c.ratio for _, c in others), 1.0])
        scores = objective.score(dense_ms * ratios, objective.judged(estimates))
        own, best = scores[: len(hoped)], max(scores[len(hoped) :])
        return [
            *(c for c, score in zip(candidates, own, strict=False) if score > best or self.knows(c)),
            candidates[-1],
        ]

    def _measure_first(
        self, candidates: Sequence[Candidate], milliseconds: Column, objective: Objective, deadline: float
    ) -> None:
        """Measures some proxies at even distances, between which the others are interpolated.

        None where the most accurate candidate is wanted, which the predicted costs say as well. Elsewhere one in the
        middle comes first, and only such as may still be the best follow: a proxy is hardly better than that of the
        next slower candidate.

        Args:
            candidates: From the fastest to dense.
            milliseconds: (candidates,) their latencies.
            objective: What makes one candidate better than another.
            deadline: No proxy is measured after it.
        """
        if objective.wants_most_accurate:
            return
        places = evenly_spaced(range(len(candidates) - 1), TUNING.first_proxies)
        while self._clock() < deadline:
            scores = objective.score(milliseconds, self._optimistic(candidates, objective))
            best = max(score for c, score in zip(candidates, scores, strict=True) if self.knows(c))
            hopeful = [place for place in places if not self.knows(candidates[place]) and scores[place] > best]
            if not hopeful:
                break
            self.accuracy(candidates[hopeful[len(hopeful) // 2]])

    def _optimistic(self, candidates: Sequence[Candidate], objective: Objective) -> Column:
        """(candidates,) the proxy of each as it is judged, of the next slower known one where it is not known."""
        known = DENSE_ACCURACY
        estimates: list[Estimate] = []
        for candidate in reversed(candidates):
            known = self.accuracy(candidate) if self.knows(candidate) else known
            estimates.append(known)
        return objective.judged(estimates[::-1])

    def knows(self, candidate: Candidate) -> bool:
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
        if not self.knows(candidates[best]):
            return candidates[best]
        known = [i for i, candidate in enumerate(candidates) if self.knows(candidate)]
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
