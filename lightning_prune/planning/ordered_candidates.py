"""Candidates in one order, each faster and less accurate than the one before: for target speed-ups."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np

from lightning_prune.planning.candidate_search import SearchTuning
from lightning_prune.planning.candidates import Candidate, CandidateKey, Proposal
from lightning_prune.planning.latency_model import budget_tolerance
from lightning_prune.planning.objectives import LatencyBudget, Objective
from lightning_prune.profiling import Estimate, LatencyStats
from lightning_prune.profiling.latency_profile import SAVING

TARGET_TUNING = SearchTuning(max_runs=12, max_tolerance_ratio=SAVING)
"""Of a search for a target speed-up, whose result is verified together with all others."""


@dataclass(frozen=True)
class OrderTuning:
    """Constants of the choice among ordered candidates.

    Attributes:
        inner_share: Range of the share of a gap at which the next amount lies: a cliff is rarely where a line says.
        further_steps: Ever larger steps towards larger amounts, before the largest is timed.
        min_saving_ratio: The least that the slowest candidate is taken to save, over dense, when a line is drawn.
    """

    inner_share: tuple[float, float] = (0.25, 0.75)
    further_steps: int = 3
    min_saving_ratio: float = 0.02


TUNING = OrderTuning()


class OrderedCandidates:
    """Finds the smallest amount that reaches a target speed-up, from timings of a few amounts.

    An amount is a number of removed tokens, or a position on a front. Latencies are taken to fall with the amount:
    they are fitted by isotonic regression, so that the noise of one amount does not pass for a cliff.

    Args:
        label: Name of the method.
        candidate_of: The candidate of an amount.
        smallest: The smallest amount that is not dense itself.
        largest: The largest amount.
        start: Objective -> the amount to time first; the largest if there is none.
        end: What the largest amount is, in words.

    Attributes:
        timings: Amount -> its timing.
    """

    def __init__(
        self,
        label: str,
        candidate_of: Callable[[int], Candidate],
        smallest: int,
        largest: int,
        start: Mapping[LatencyBudget, int] | None = None,
        end: str = "the most that the method can remove",
    ) -> None:
        self.label, self.smallest, self.largest, self.end = label, smallest, largest, end
        self.start: dict[LatencyBudget, int] = dict(start or {})
        self.timings: dict[int, LatencyStats] = {}
        self._candidate_of = candidate_of
        self._amounts: dict[CandidateKey, int] = {}
        self._steps: Counter[LatencyBudget] = Counter()  # towards larger amounts

    def candidate(self, amount: int) -> Candidate:
        """The candidate of an amount, with the latency that the timings predict."""
        candidate = self._candidate_of(amount)
        self._amounts[candidate.key] = amount
        return replace(candidate, ratio=self.ratio(amount))

    def amount(self, candidate: Candidate) -> int:
        """The amount of a candidate that was proposed."""
        return self._amounts[candidate.key]

    def fastest(self) -> Candidate:
        """The candidate of the largest amount."""
        return self.candidate(self.largest)

    def accuracy(self, candidate: Candidate) -> Estimate:
        """Minus the amount: accuracy is not measured, but falls with it."""
        return Estimate(-float(self.amount(candidate)), 0.0)

    def observe(self, candidate: Candidate, timing: LatencyStats) -> None:
        """Takes a timing."""
        self.timings[self.amount(candidate)] = timing

    def restart(self, start: Mapping[LatencyBudget, int]) -> None:
        """Forgets all timings: those that chose the amounts speak too well of them to be believed."""
        self.timings, self.start = {}, dict(start)
        self._steps.clear()

    def ratio(self, amount: int) -> float:
        """Latency over dense of an amount, by the timings; linear between them."""
        amounts, ratios = self._fitted()
        if 0 not in amounts:
            amounts, ratios = [0, *amounts], [1.0, *ratios]
        return float(np.interp(amount, amounts, ratios))

    def reaches(self, amount: int, objective: LatencyBudget, dense_ms: float) -> bool | None:
        """Whether an amount reaches a target, within the noise of its timing; None if it was not timed."""
        if amount not in self.timings:
            return None
        wanted = objective.limit_ms(dense_ms) / dense_ms
        return self.ratio(amount) <= wanted * (1 + budget_tolerance(self.timings[amount], SAVING))

    def propose(self, objective: Objective, dense_ms: float, deadline: float) -> Proposal:
        """The amount to time next, or the timed one that is the smallest to reach the target.

        Args:
            objective: A latency budget.
            dense_ms: Latency of the dense model.
            deadline: Unused: nothing is measured here.
        """
        assert isinstance(objective, LatencyBudget)
        start = self.start.get(objective, self.largest)
        if start not in self.timings:
            return Proposal(self.candidate(start))
        passing = [a for a in self.timings if self.reaches(a, objective, dense_ms)]
        if not passing and self.largest in self.timings:
            return Proposal(self.fastest(), f"The {objective} cannot be reached.", feasible=False)
        wanted = objective.limit_ms(dense_ms) / dense_ms
        amount = self._next(min(passing), wanted) if passing else self._further(objective, wanted)
        candidate = self.candidate(amount)
        return Proposal(candidate if amount in self.timings else replace(candidate, ratio=min(candidate.ratio, wanted)))

    def _next(self, passing: int, wanted: float) -> int:
        """A smaller amount than the smallest that reaches the target, or that one if no smaller one will do."""
        ratio, timing = self.ratio(passing), self.timings[passing]
        tokens = floor(self._tokens(passing, wanted))
        if ratio >= wanted * (1 - budget_tolerance(timing, SAVING)) or not tokens:
            return passing
        failing = max((a for a in self.timings if a < passing), default=self.smallest - 1)
        if passing - tokens > failing or failing not in self.timings:
            return max(passing - tokens, self.smallest)
        # Between the two by a straight line, but well inside.
        low, high = TUNING.inner_share
        share = (self.ratio(failing) - wanted) / max(self.ratio(failing) - ratio, 1e-9)
        inside = ceil(min(max(share, low), high) * (passing - failing))
        return failing + min(max(inside, 1), max(passing - failing - 1, 1))

    def _further(self, objective: LatencyBudget, wanted: float) -> int:
        """A larger amount than all that were timed, in ever larger steps; none of them reaches the target."""
        self._steps[objective] += 1
        if self._steps[objective] > TUNING.further_steps:
            return self.largest  # so that no target is said to be out of reach unless it is
        amount = max(self.timings)
        step = max(ceil(self._tokens(amount, wanted)), 1) * 2 ** (self._steps[objective] - 1)
        return min(amount + step, self.largest)

    def _tokens(self, amount: int, wanted: float) -> float:
        """By how many an amount differs from the wanted one, by the line through it and amount 0."""
        ratio = self.ratio(amount)
        return abs(ratio - wanted) * max(amount, 1) / max(self.ratio(0) - ratio, TUNING.min_saving_ratio)

    def _fitted(self) -> tuple[list[int], list[float]]:
        """The timed amounts, ascending, and their latencies over dense, fitted to fall with the amount."""
        from scipy.optimize import isotonic_regression  # slow to import

        amounts = sorted(self.timings)
        if not amounts:
            return [], []
        ratios = [self.timings[amount].ratio for amount in amounts]
        weights = [self.timings[amount].rounds for amount in amounts]
        return amounts, isotonic_regression(ratios, weights=weights, increasing=False).x.tolist()


def amount_grid(smallest: int, largest: int, points: int) -> list[int]:
    """Amounts at even distances, both ends among them."""
    return sorted({int(amount) for amount in np.linspace(smallest, largest, points).round()})
