"""The fewest tokens that a method must remove to be so much faster than the dense model, on this device."""

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.goals import NEAR, Goal, VariantOf
from lightning_prune.profiling import DENSE, Interleaved, Variant
from lightning_prune.progress import Ticker

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
    race: Interleaved[Variant],
    variant_of: VariantOf,
    least: int,
    most: int,
    speedups: Sequence[float],
    max_seconds: float,
    tick: Ticker,
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
        max_seconds: Time limit; one round over the coarse grid is completed all the same.
        tick: Called after every run.
    """
    from sklearn.isotonic import isotonic_regression  # takes a second to import

    start = race.clock()
    limit = start + max_seconds
    race.measure([], 1, progress=tick)
    round_trip = race.result(DENSE).milliseconds / 1e3
    fewest, many = _POINTS
    points = max(fewest, min(many, int(0.5 * max_seconds / (round_trip * (_ROUNDS + 1)))))
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


def aim(race: Interleaved[Variant], goals: Sequence[Goal], max_seconds: float, tick: Ticker) -> None:
    """Moves the goals of one method by short runs of their own, until they reach their targets or the time is over.

    Args:
        race: That of the search.
        goals: Changed in place; all are open again afterwards, for the run that counts.
        max_seconds: Time limit.
        tick: Called after every run.
    """
    limit = race.clock() + max_seconds
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
        before = race.clock()
        race.measure(pending, 1, progress=tick)
        slow = [variant for variant in pending if race.result(variant).ratio > _SLOW]
        fast = [variant for variant in pending if variant not in slow]
        race.measure(slow, min(rounds, _AIMING) - 1, before + max_seconds / 10, tick)
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
