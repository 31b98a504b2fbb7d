"""Target speed-ups: the fewest removed tokens that reach each, verified on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, sqrt
from typing import NamedTuple

import numpy as np

from lightning_prune._utils.progress import OnStep
from lightning_prune.errors import ArgumentError
from lightning_prune.profiling import DENSE, InterleavedTimer, LatencyStats, Variant
from lightning_prune.profiling.latency_profile import SAVING

NEAR = 0.005  # a ratio that misses by no more has reached its target: no clock is surer
_ATTEMPTS = 6  # verifications of one goal

VariantOf = Callable[[int], Variant]


@dataclass
class SpeedupTarget:
    """A target speed-up of one method while it is being verified.

    Attributes:
        variant_of: The variant that removes so many tokens.
        speedup: The target.
        amount: What is tried; what is to be deployed, in the end.
        least: The smallest amount that may be tried.
        most: The largest.
        open: Whether another amount is to be tried.
        ratios: Amount that was timed -> its latency over dense.
        passed: The same -> whether it reaches the target.
        best: The largest speed-up that was timed.
    """

    variant_of: VariantOf
    speedup: float
    amount: int
    least: int
    most: int
    open: bool = True
    ratios: dict[int, float] = field(default_factory=dict)
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

    def judge(self, timing: LatencyStats) -> None:
        """Takes the timing of the present amount and moves on to another, unless this is the smallest that will do.

        A ratio that misses the target by no more than its noise, two standard errors, but at least 0.5% and at most 2%,
        counts as reached. One that is better by more than that, and by more than a token is worth, asks for fewer
        tokens. Between an amount that misses the target and one that reaches it, others are tried until they meet, a
        few times at most.
        """
        wanted, noise = 1 / self.speedup, min(max(2 * ratio_stderr(timing), NEAR), SAVING)
        self.best = max(self.best, 1 / timing.ratio)
        self.ratios[self.amount], self.passed[self.amount] = timing.ratio, timing.ratio <= wanted + noise
        content = self.reached and timing.ratio >= wanted - noise
        following = self.amount if content else self._following(wanted)
        self.open = following not in self.passed and len(self.passed) < _ATTEMPTS
        if self.open:
            self.amount = following
        else:
            self.settle()

    def _following(self, wanted: float) -> int:
        """The amount to try after the present one, which reaches too little or more than is wanted."""
        passing = min((a for a, passed in self.passed.items() if passed), default=self.most + 1)
        failing = max((a for a, passed in self.passed.items() if not passed and a < passing), default=self.least - 1)
        ratio = self.ratios[self.amount]
        # What a token is worth, by the line to dense; cliffs and plateaus are found by trying.
        tokens = abs(ratio - wanted) * max(self.amount, 1) / max(1 - ratio, 0.02)
        if self.reached:
            return max(self.amount - floor(tokens), failing + 1)
        if passing in self.passed:
            # Between the two by a straight line, but well inside, as a cliff would have it.
            share = (self.ratios[failing] - wanted) / max(self.ratios[failing] - self.ratios[passing], 1e-9)
            inside = ceil(min(max(share, 0.25), 0.75) * (passing - failing))
            return failing + max(min(inside, passing - failing - 1), 1)
        if len(self.passed) >= _ATTEMPTS - 2:
            return self.most  # so that nobody is told that it cannot be reached unless it cannot
        eager = 2 ** (len(self.passed) - 1)  # where the line misled before
        return min(self.amount + max(1, ceil(tokens)) * eager, self.most)

    def settle(self) -> None:
        """Ends with the smallest amount that reaches the target, or the largest that was timed."""
        self.open = False
        self.amount = min((a for a, passed in self.passed.items() if passed), default=max(self.passed))


def ratio_stderr(timing: LatencyStats) -> float:
    """Standard error of the median ratio, from its quartiles and the rounds."""
    return 1.2533 * timing.ratio_spread / 0.6745 / sqrt(timing.rounds)


_ROUNDS = 3  # of the search; what it finds is verified by many more
_POINTS = (4, 16)  # fewest and most amounts of the coarse grid
_AIMING = 9  # rounds of each that the search itself makes, before the run that counts
_SLOW = 3.0  # times dense: a variant that is slower is timed in fewer rounds, which it would else fill alone


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
    race: InterleavedTimer[Variant],
    variant_of: VariantOf,
    least: int,
    most: int,
    speedups: Sequence[float],
    time_limit: float,
    tick: OnStep,
) -> Search:
    """Measures amounts in interleaved rounds: a coarse grid, then the middles of the steps that hold the targets.

    Amounts are chosen by the non-increasing curve that fits the measured ratios best, so that the noise of a single
    amount does not pass for a cliff.

    Args:
        race: Times variants; its reference is dense. Its clock is the one that the time limit is on.
        variant_of: The variant that removes so many tokens.
        least: The smallest amount that is not dense itself: 1, or 0 where the variant is in 8 bits.
        most: The largest.
        speedups: The targets.
        time_limit: Time limit; one round over the coarse grid is completed all the same.
        tick: Called after every run.
    """
    from sklearn.isotonic import isotonic_regression  # takes a second to import

    start = race.clock()
    limit = start + time_limit
    race.measure([], 1, on_step=tick)
    round_trip = race.result(DENSE).milliseconds / 1e3
    fewest, many = _POINTS
    points = max(fewest, min(many, int(0.5 * time_limit / (round_trip * (_ROUNDS + 1)))))
    known = sorted({int(amount) for amount in np.linspace(least, most, points).round()})
    race.measure([variant_of(amount) for amount in known], _ROUNDS, limit, tick)

    while True:
        ratios = [race.result(variant_of(amount)).ratio for amount in known]
        fitted = isotonic_regression(ratios, increasing=False)
        near = {s: 1 / s + NEAR for s in speedups}
        reach = {s: next((a for a, r in zip(known, fitted, strict=True) if r <= near[s]), None) for s in speedups}
        if race.clock() >= limit:
            break
        found = [amount for amount in reach.values() if amount is not None]
        below = {amount: max((a for a in known if a < amount), default=least - 1) for amount in found}
        middles = {(low + high) // 2 for high, low in below.items() if high - low > 1}
        if not middles:
            break
        race.measure([variant_of(amount) for amount in sorted(middles)], _ROUNDS, limit, tick)
        known = sorted({*known, *middles})
    fastest = int(np.argmin(ratios))
    return Search(reach, 1 / ratios[fastest], known[fastest])


def aim(race: InterleavedTimer[Variant], goals: Sequence[SpeedupTarget], time_limit: float, tick: OnStep) -> None:
    """Moves the goals of one method by short runs of their own, until they reach their targets or the time is over.

    Args:
        race: That of the search.
        goals: Changed in place; all are open again afterwards, for the run that counts.
        time_limit: Time limit.
        tick: Called after every run.
    """
    limit = race.clock() + time_limit
    while race.clock() < limit and any(goal.open for goal in goals):
        race.measure(dict.fromkeys(goal.variant for goal in goals if goal.open), _AIMING, limit, tick)
        for goal in goals:
            if goal.open and race.has(goal.variant):
                goal.judge(race.result(goal.variant))
    for goal in goals:
        if goal.passed:
            goal.settle()
            goal.open, goal.passed = True, {}


def verify(
    race: InterleavedTimer[Variant],
    goals: Sequence[SpeedupTarget],
    others: Sequence[Variant],
    rounds: int,
    time_limit: float,
    tick: OnStep,
) -> None:
    """Times all variants in one interleaved run and moves those that miss their targets on, a few times at most.

    Args:
        race: A fresh one: what the search saw chose the amounts, and so says too much in their favour.
        goals: Changed in place; none is open afterwards.
        others: Variants without a target that are timed in the same run.
        rounds: Of each verification, if time allows.
        time_limit: Time limit; one round is completed all the same, and what is open then is taken as it is.
        tick: Called after every run.
    """
    limit = race.clock() + time_limit
    timed: set[Variant] = set()
    pending = list(dict.fromkeys([*others, *(goal.variant for goal in goals)]))
    while pending:
        before = race.clock()
        race.measure(pending, 1, on_step=tick)
        slow = [variant for variant in pending if race.result(variant).ratio > _SLOW]
        fast = [variant for variant in pending if variant not in slow]
        race.measure(slow, min(rounds, _AIMING) - 1, before + time_limit / 10, tick)
        # Half of what is left for this run, so that time remains to move those that miss their targets.
        race.measure(fast, rounds - 1, (race.clock() + limit) / 2, tick)
        timed.update(pending)
        for goal in goals:
            while goal.open and goal.variant in timed:
                goal.judge(race.result(goal.variant))
        if race.clock() >= limit:
            break
        pending = list(dict.fromkeys(goal.variant for goal in goals if goal.open))
    for goal in goals:
        goal.settle()
