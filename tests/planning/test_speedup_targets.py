"""From targets to amounts, on devices whose every latency is known."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lightning_prune as lp
from lightning_prune.planning.speedup_targets import SpeedupTarget, aim, check_speedups, search, verify
from lightning_prune.profiling import DENSE, InterleavedTimer, Variant
from lightning_prune.quantization import Int8Weights

MOST = 190


def removes(amount: int) -> Variant:
    return Variant("pomt", lp.Schedule.single(12, 3, amount))


def in_8_bits(amount: int) -> Variant:
    return Variant("pomt", lp.Schedule.single(12, 3, amount), weights=Int8Weights)


class Device:
    """Runs each variant in the time that a function says, times noise, under its own clock, which also drifts."""

    def __init__(self, share: Callable[[int], float], noise: float = 0.0, int8: float = 1.0) -> None:
        self.share, self.noise, self.int8 = share, noise, int8
        self.now, self.variant, self.random = 0.0, DENSE, np.random.default_rng(0)
        self.runs = 0

    def seconds(self, variant: Variant) -> float:
        amount = variant.schedule.total_removed if isinstance(variant.schedule, lp.Schedule) else 0
        return 0.01 * (self.share(amount) if amount else 1.0) * (self.int8 if variant.weights else 1.0)

    def prepare(self, variant: Variant) -> None:
        self.variant = variant

    def run(self) -> None:
        self.runs += 1
        drift = 1 + 0.2 * math.sin(self.now)
        self.now += self.seconds(self.variant) * drift * (1 + self.noise * abs(self.random.standard_normal()))

    def race(self) -> InterleavedTimer[Variant]:
        return InterleavedTimer(self.prepare, self.run, torch.device("cpu"), DENSE, clock=lambda: self.now)

    def reach(self, speedups: list[float], variant_of: Any = removes, least: int = 1, seconds: float = 20.0) -> Any:
        found = search(self.race(), variant_of, least, MOST, speedups, seconds, lambda: None)
        start = {speedup: MOST if amount is None else amount for speedup, amount in found.amounts.items()}
        goals = [SpeedupTarget(variant_of, speedup, start[speedup], least, MOST) for speedup in speedups]
        aim(self.race(), goals, seconds, lambda: None)
        verify(self.race(), goals, [], 51, 3 * seconds, lambda: None)
        return {goal.speedup: goal for goal in goals}, found


def straight(amount: int) -> float:
    return 1.02 - 0.8 * amount / 190


def cliff(amount: int) -> float:
    return 0.5 if amount >= 69 else 1.0 - amount / 1000


def plateau(amount: int) -> float:
    return 1.01 if amount < 100 else 1.01 - 0.007 * (amount - 100)


def smallest(share: Callable[[int], float], speedup: float) -> int | None:
    return next((amount for amount in range(1, MOST + 1) if share(amount) <= 1 / speedup + 1e-12), None)


def is_smallest(amount: int, share: Callable[[int], float], speedup: float) -> bool:
    """Or one of those that miss the target by half a percent of dense, and a little for the drift of the clock."""
    exact, nearly = smallest(share, speedup), smallest(share, 1 / (1 / speedup + 0.006))
    return exact is not None and nearly is not None and nearly <= amount <= exact


@pytest.mark.parametrize("share", [straight, cliff, plateau])
def test_finds_the_smallest_amount_that_reaches_each_target(share: Callable[[int], float]) -> None:
    speedups = [1.1, 1.25, 1.5, 2.0]
    goals, _ = Device(share).reach(speedups)
    for speedup in speedups:
        assert goals[speedup].reached
        assert is_smallest(goals[speedup].amount, share, speedup), speedup


@pytest.mark.parametrize("share", [straight, cliff, plateau])
def test_finds_nearly_the_smallest_where_timings_are_noisy(share: Callable[[int], float]) -> None:
    speedups = [1.1, 1.25, 1.5, 1.9]
    goals, _ = Device(share, noise=0.03).reach(speedups)
    for speedup in speedups:
        goal = goals[speedup]
        assert goal.reached
        assert abs(goal.amount - smallest(share, speedup)) <= 5, speedup
        assert share(goal.amount) <= 1.02 / speedup


def test_a_target_that_cannot_be_reached_says_what_can() -> None:
    goals, found = Device(straight, noise=0.01).reach([1.5, 6.0])
    assert goals[1.5].reached
    assert not goals[6.0].reached
    assert goals[6.0].unreachable
    assert goals[6.0].amount == MOST
    assert goals[6.0].best == pytest.approx(1 / straight(MOST), rel=0.02)
    assert found.amounts[6.0] is None
    assert found.at == MOST


def test_a_flat_device_reaches_nothing() -> None:
    goals, found = Device(lambda _: 1.03, noise=0.005).reach([1.1, 2.0])
    assert [goal.unreachable for goal in goals.values()] == [True, True]
    assert found.best < 1


def test_8_bits_alone_may_reach_a_target() -> None:
    goals, _ = Device(straight, int8=0.7).reach([1.25, 2.0], in_8_bits, least=0)
    assert goals[1.25].amount == 0
    assert goals[1.25].variant.weights
    assert is_smallest(goals[2.0].amount, lambda amount: 0.7 * straight(amount), 2.0)


def test_a_search_that_was_misled_is_set_right_by_the_verification() -> None:
    """Too few tokens and too many, on a curve with a cliff: both end at the smallest amount."""
    device = Device(cliff)
    goals = [SpeedupTarget(removes, 1.5, amount, 1, MOST) for amount in (3, 60, 68, 69, 70, 120, MOST)]
    verify(device.race(), goals, [], 5, 60.0, lambda: None)
    assert all(goal.reached for goal in goals)
    assert [goal.amount for goal in goals[2:4]] == [69, 69]
    assert all(69 <= goal.amount <= 95 for goal in goals)


@pytest.mark.parametrize(
    ("price", "slope", "wave", "cliff_at", "fall", "speedup", "seed"),
    [
        (0.0032, 0.823, 15, 154, 0.08, 1.25, 81),
        (0.0691, 0.833, 22, 73, 0.0, 1.5, 108),
        (0.0136, 0.817, 23, 121, 0.08, 1.25, 142),
    ],
)
def test_a_jump_past_the_target_comes_back(
    price: float, slope: float, wave: int, cliff_at: int, fall: float, speedup: float, seed: int
) -> None:
    """On noisy waves on which a step too short was followed by one to the very end."""

    def waves(amount: int) -> float:
        return 1 + price - slope * (amount // wave * wave) / 190 - (fall if amount >= cliff_at else 0)

    device = Device(waves, noise=0.02)
    device.random = np.random.default_rng(seed)
    goal = device.reach([1.1, 1.25, 1.5], seconds=5.0)[0][speedup]
    best = waves(smallest(waves, speedup))
    assert goal.reached
    assert waves(goal.amount) >= 0.98 * best


def test_the_time_limit_holds_and_leaves_no_goal_open() -> None:
    device = Device(straight)
    search(device.race(), removes, 1, MOST, [1.5], 0.5, lambda: None)
    assert device.now < 0.6
    device = Device(straight)
    goals = [SpeedupTarget(removes, speedup, 3, 1, MOST) for speedup in (1.5, 2.0)]
    verify(device.race(), goals, [Variant(weights=Int8Weights)], 51, 0.05, lambda: None)
    assert device.now < 0.15
    assert [(goal.open, goal.reached, goal.unreachable, goal.amount) for goal in goals] == [
        (False, False, False, 3)
    ] * 2
    assert goals[0].best == pytest.approx(1 / straight(3), rel=0.01)  # the clock of this device drifts


def test_a_slow_variant_does_not_take_the_time_of_the_others() -> None:
    device = Device(straight, int8=40.0)
    race = device.race()
    goals = [SpeedupTarget(removes, speedup, 3, 1, MOST) for speedup in (1.25, 2.0)]
    verify(race, goals, [Variant(weights=Int8Weights)], 51, 20.0, lambda: None)
    assert device.now < 21
    assert all(goal.reached for goal in goals)
    assert race.result(goals[0].variant).rounds >= 50
    assert 3 <= race.result(Variant(weights=Int8Weights)).rounds <= 10


def test_equal_amounts_are_timed_once() -> None:
    device = Device(cliff)
    race = device.race()
    goals = [SpeedupTarget(removes, speedup, 69, 1, MOST) for speedup in (1.25, 1.5, 1.75)]
    verify(race, goals, [], 4, 60.0, lambda: None)
    assert {goal.amount for goal in goals} == {69}
    assert race.result(removes(69)).rounds == 4


@pytest.mark.parametrize(
    ("speedups", "message"),
    [
        ([], r"`speedups` must be a list of numbers > 1, got \[\]\."),
        (1.5, r"`speedups` must be a list of numbers > 1, got 1\.5\."),
        ([0.9], r"`speedups` must be finite numbers > 1 \(1 is the dense model\), got 0\.9\."),
        ([1.5, 1.0], r"`speedups` must be finite numbers > 1 \(1 is the dense model\), got 1\.0\."),
        ([-2], r"finite numbers > 1 .* got -2\."),
        ([math.inf], r"finite numbers > 1 .* got inf\."),
        ([math.nan], r"finite numbers > 1 .* got nan\."),
        ([True], r"finite numbers > 1 .* got True\."),
        ([1.5, 1.50000001], r"`speedups` must differ from one another, got 1\.5 twice\."),
        ([1.5, 2, 1.5], r"`speedups` must differ from one another, got 1\.5 twice\."),
    ],
)
def test_targets_that_are_none(speedups: Any, message: str) -> None:
    with pytest.raises(lp.ArgumentError, match=message):
        check_speedups(speedups)


def test_targets_are_put_in_order() -> None:
    assert check_speedups((2, 1.25)) == [1.25, 2.0]
