"""The fewest tokens that a method must remove to be so much faster than the dense model, on this device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, sqrt
from typing import NamedTuple

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.profiling import DENSE, Interleaved, Timing, Variant
from lightning_prune.profiling.curve import SAVING
from lightning_prune.progress import Ticker

_ROUNDS = 3  # of the search; what it finds is verified by many more
_POINTS = (4, 16)  # fewest and most amounts of the coarse grid
_ATTEMPTS = 5  # verifications of one goal

VariantOf = Callable[[int], Variant]


def check_speedups(speedups: Sequence[float]) -> list[float]:
    """The targets in ascending order.

    Args:
        speedups: Dense latency over wanted latency, each > 1.

    Raises:
        ArgumentError: If there is none, one is not a finite number > 1 (1 is the dense model), or one occurs twice.
    """
    if not isinstance(speedups, list | tuple) or not speedups:
        raise ArgumentError(f"`speedups` must be a list of numbers > 1, got {speedups!r}.")
    for value in speedups:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not isfinite(value) or value <= 1:
            raise ArgumentError(f"`speedups` must be finite numbers > 1 (1 is the dense model), got {value!r}.")
    told = [f"{value:g}" for value in speedups]  # as rows are called
    if len(set(told)) < len(told):
        twice = next(name for name in told if told.count(name) > 1)
        raise ArgumentError(f"`speedups` must differ from one another, got {twice} twice.")
    return sorted(float(value) for value in speedups)


class Search(NamedTuple):
    """What the latency curve of one method says.

    Attributes:
        amounts: Target -> the smallest amount that was seen to reach it; None where none did.
        best: The largest speed-up seen.
        at: The amount that it was seen at.
    """

    amounts: dict[float, int | None]
    best: float
    at: int


def search(
    race: Interleaved[Variant],
    variant_of: VariantOf,
    least: int,
    most: int,
    speedups: Sequence[float],
    max_seconds: float,
    tick: Ticker,
) -> Search:
    """Measures amounts in interleaved rounds: a coarse grid, then the middles of the steps that hold the targets.

    Args:
        race: Times variants; its reference is dense. Its clock is the one that the time limit is on.
        variant_of: The variant that removes so many tokens.
        least: The smallest amount that is not dense itself: 1, or 0 where the variant is in 8 bits.
        most: The largest.
        speedups: The targets.
        max_seconds: Time limit; one round over the coarse grid is completed all the same.
        tick: Called after every run.
    """
    start = race.clock()
    limit = start + max_seconds
    race.measure([], 1, progress=tick)
    round_trip = race.result(DENSE).milliseconds / 1e3
    fewest, many = _POINTS
    points = max(fewest, min(many, int(0.5 * max_seconds / (round_trip * (_ROUNDS + 1)))))
    known = sorted({int(amount) for amount in np.linspace(least, most, points).round()})
    race.measure([variant_of(amount) for amount in known], _ROUNDS, limit, tick)

    def ratio(amount: int) -> float:
        return race.result(variant_of(amount)).ratio

    def reaching(speedup: float) -> int | None:
        return next((amount for amount in known if ratio(amount) <= 1 / speedup), None)

    while race.clock() < limit:
        found = [amount for amount in map(reaching, speedups) if amount is not None]
        below = {amount: max((a for a in known if a < amount), default=least - 1) for amount in found}
        middles = {(low + high) // 2 for high, low in below.items() if high - low > 1}
        if not middles:
            break
        race.measure([variant_of(amount) for amount in sorted(middles)], _ROUNDS, limit, tick)
        known = sorted({*known, *middles})
    fastest = min(known, key=ratio)
    return Search({speedup: reaching(speedup) for speedup in speedups}, 1 / ratio(fastest), fastest)


@dataclass
class Goal:
    """A target speed-up of one method while it is being verified.

    Attributes:
        variant_of: The variant that removes so many tokens.
        speedup: The target.
        amount: What is tried; what is to be deployed, in the end.
        least: The smallest amount that may be tried.
        most: The largest.
        open: Whether another amount is to be tried.
        passed: Amount that was timed -> whether it reaches the target.
        best: The largest speed-up that was timed.
    """

    variant_of: VariantOf
    speedup: float
    amount: int
    least: int
    most: int
    open: bool = True
    passed: dict[int, bool] = field(default_factory=dict)
    best: float = 0.0

    @property
    def variant(self) -> Variant:
        """What is tried."""
        return self.variant_of(self.amount)

    @property
    def reached(self) -> bool:
        """Whether the amount is seen to reach the target."""
        return self.passed.get(self.amount, False)

    @property
    def unreachable(self) -> bool:
        """Whether not even the largest amount reaches the target."""
        return not self.reached and self.passed.get(self.most) is False

    def judge(self, timing: Timing) -> None:
        """Takes the timing of the present amount and moves on to another, unless this is the smallest that will do.

        A ratio that misses the target by no more than its noise, two standard errors and at most 2%, counts as reached.
        One that is better by more than that, and by more than a token is worth, asks for fewer tokens.
        """
        wanted, noise = 1 / self.speedup, min(2 * error_of(timing), SAVING)
        self.best = max(self.best, 1 / timing.ratio)
        self.passed[self.amount] = timing.ratio <= wanted + noise
        passing = min((amount for amount, passed in self.passed.items() if passed), default=None)
        # What a token is worth, by the line to dense; cliffs and plateaus are found by trying.
        tokens = abs(timing.ratio - wanted) * max(self.amount, 1) / max(1 - timing.ratio, 0.02)
        following = self.amount
        if not self.reached:
            top = self.most if passing is None else passing - 1
            eager = 2 ** (len(self.passed) - 1)  # where the line misled before
            following = min(self.amount + max(1, ceil(tokens)) * eager, top)
            if passing is None and len(self.passed) >= _ATTEMPTS - 2:
                following = self.most  # so that nobody is told that it cannot be reached unless it cannot
        elif timing.ratio < wanted - noise:
            failing = max((a for a, passed in self.passed.items() if not passed and a < self.amount), default=-1)
            following = max(self.amount - floor(tokens), failing + 1, self.least)
        self.open = following not in self.passed and len(self.passed) < _ATTEMPTS
        if self.open:
            self.amount = following
        else:
            self.settle()

    def settle(self) -> None:
        """Ends with the smallest amount that reaches the target, or the largest that was timed."""
        self.open = False
        self.amount = min((a for a, passed in self.passed.items() if passed), default=max(self.passed))


def error_of(timing: Timing) -> float:
    """Standard error of the median ratio, from its quartiles and the rounds."""
    return 1.2533 * timing.ratio_spread / 0.6745 / sqrt(timing.rounds)


def verify(
    race: Interleaved[Variant],
    goals: Sequence[Goal],
    others: Sequence[Variant],
    rounds: int,
    max_seconds: float,
    tick: Ticker,
) -> None:
    """Times all variants in one interleaved run and moves those that miss their targets on, a few times at most.

    Args:
        race: A fresh one: what the search saw chose the amounts, and so says too much in their favour.
        goals: Changed in place; none is open afterwards.
        others: Variants without a target that are timed in the same run.
        rounds: Of each verification, if time allows.
        max_seconds: Time limit; one round is completed all the same, and what is open then is taken as it is.
        tick: Called after every run.
    """
    limit = race.clock() + max_seconds
    timed: set[Variant] = set()
    pending = list(dict.fromkeys([*others, *(goal.variant for goal in goals)]))
    while pending:
        race.measure(pending, rounds, limit, tick)
        timed.update(pending)
        for goal in goals:
            while goal.open and goal.variant in timed:
                goal.judge(race.result(goal.variant))
        if race.clock() >= limit:
            break
        pending = list(dict.fromkeys(goal.variant for goal in goals if goal.open))
    for goal in goals:
        goal.settle()
