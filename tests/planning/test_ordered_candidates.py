"""The smallest amount that reaches a target speed-up, on devices whose latencies are known."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune._utils.validation import check_speedups
from lightning_prune.comparison.final_run import Target, verify_targets
from lightning_prune.comparison.target_search import search_targets
from lightning_prune.planning.candidate_search import CandidateSearch
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.ordered_candidates import TARGET_TUNING, OrderedCandidates, amount_grid
from lightning_prune.profiling import DENSE, InterleavedTimer, Variant
from lightning_prune.quantization import Int8Weights
from lightning_prune.reduction import POMT

MOST = 190


def removes(amount: int) -> Candidate:
    return Candidate("pomt", POMT(), lp.Schedule.single(12, 3, amount), 1.0)


def in_8_bits(amount: int) -> Candidate:
    return Candidate("pomt", POMT(), lp.Schedule.single(12, 3, amount), 1.0, weights=Int8Weights)


def target(source: OrderedCandidates, speedup: float, start: int) -> Target:
    budget = lp.LatencyBudget(speedup=speedup)
    source.start[budget] = start
    return Target(budget, source, CandidateSearch(budget, [source], 1.0, tuning=TARGET_TUNING))


def amounts(targets: list[Target]) -> list[int]:
    return [t.source.amount(t.candidate) for t in targets if t.candidate is not None]


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

    def timer(self) -> InterleavedTimer[Variant]:
        return InterleavedTimer(self.prepare, self.run, lambda: None, DENSE, clock=lambda: self.now)

    def search(
        self, speedups: list[float], candidate_of: Any = removes, smallest: int = 1, seconds: float = 20.0
    ) -> dict[float, Target]:
        """What a comparison does with each method."""
        source = OrderedCandidates("pomt", candidate_of, smallest, MOST)
        budgets = [lp.LatencyBudget(speedup=speedup) for speedup in speedups]
        starts = search_targets(self.timer(), source, budgets, 2 * seconds, lambda: None)
        source.restart(starts)
        targets = [target(source, speedup, starts[b]) for speedup, b in zip(speedups, budgets, strict=True)]
        verify_targets(self.timer(), targets, [], 51, 3 * seconds, lambda: None)
        return dict(zip(speedups, targets, strict=True))


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


def test_every_variant_of_the_final_run_has_a_latency_after_the_deadline() -> None:
    device, others = Device(straight), [Variant(POMT(), lp.Schedule.single(12, 3, amount)) for amount in (20, 40)]
    device.now = 1e6
    source = OrderedCandidates("pomt", removes, 1, MOST)
    targets = [target(source, 1.25, 60), target(source, 2.0, 120)]
    timer = device.timer()
    verify_targets(timer, targets, others, 51, -10.0, lambda: None)
    for variant in [DENSE, *others, *(t.candidate.variant for t in targets if t.candidate is not None)]:
        assert timer.result(variant).rounds >= 3
        assert timer.result(variant).ratio == pytest.approx(device.seconds(variant) / 0.01, rel=0.05)


def test_a_source_without_candidates_leaves_its_targets_unreached() -> None:
    def dense(_: int) -> Candidate:
        return Candidate("auto", None, lp.Schedule([0] * 12), 1.0)

    device, budget = Device(straight), lp.LatencyBudget(speedup=1.5)
    source = OrderedCandidates("auto", dense, 0, 0, {budget: 0})
    starts = search_targets(device.timer(), source, [budget], 1.0, lambda: None)
    source.restart(starts)
    only, timer = target(source, 1.5, starts[budget]), device.timer()
    verify_targets(timer, [only], [], 51, 1.0, lambda: None)
    assert (starts, only.reached, only.exhausted, only.best_speedup) == ({budget: 0}, False, True, 1.0)
    assert timer.result(DENSE).rounds >= 3
    assert (only.unreached("auto").best, only.unreached("auto").target_speedup) == (1.0, 1.5)


@pytest.mark.parametrize("share", [straight, cliff, plateau])
def test_finds_the_smallest_amount_that_reaches_each_target(share: Callable[[int], float]) -> None:
    speedups = [1.1, 1.25, 1.5, 2.0]
    targets = Device(share).search(speedups)
    for speedup in speedups:
        assert targets[speedup].reached
        assert is_smallest(amounts([targets[speedup]])[0], share, speedup), speedup


@pytest.mark.parametrize("share", [straight, cliff, plateau])
def test_finds_nearly_the_smallest_if_timings_are_noisy(share: Callable[[int], float]) -> None:
    speedups = [1.1, 1.25, 1.5, 1.9]
    targets = Device(share, noise=0.03).search(speedups)
    for speedup in speedups:
        (amount,) = amounts([targets[speedup]])
        assert targets[speedup].reached
        assert abs(amount - (smallest(share, speedup) or MOST)) <= 5, speedup
        assert share(amount) <= 1.02 / speedup


def test_a_target_that_cannot_be_reached_says_what_can() -> None:
    targets = Device(straight, noise=0.01).search([1.5, 6.0])
    assert targets[1.5].reached
    assert not targets[1.5].exhausted
    assert not targets[6.0].reached
    assert targets[6.0].exhausted
    assert amounts([targets[6.0]]) == [MOST]
    assert targets[6.0].best_speedup == pytest.approx(1 / straight(MOST), rel=0.02)


def test_a_flat_device_reaches_nothing() -> None:
    targets = Device(lambda _: 1.03, noise=0.005).search([1.1, 2.0])
    assert [target.exhausted for target in targets.values()] == [True, True]
    assert max(target.best_speedup for target in targets.values()) < 1


def test_8_bits_alone_may_reach_a_target() -> None:
    targets = Device(straight, int8=0.7).search([1.25, 2.0], in_8_bits, smallest=0)
    assert amounts([targets[1.25]]) == [0]
    assert targets[1.25].candidate is not None
    assert targets[1.25].candidate.variant == Variant(weights=Int8Weights)
    assert is_smallest(amounts([targets[2.0]])[0], lambda amount: 0.7 * straight(amount), 2.0)


def test_a_search_that_was_misled_is_corrected_by_the_verification() -> None:
    """Too few tokens and too many, on a curve with a cliff: all end at the smallest amount."""
    device = Device(cliff)
    starts = (3, 60, 68, 69, 70, 120, MOST)
    targets = [target(OrderedCandidates(f"from {start}", removes, 1, MOST), 1.5, start) for start in starts]
    verify_targets(device.timer(), targets, [], 5, 60.0, lambda: None)
    assert all(target.reached for target in targets)
    found = amounts(targets)
    assert found[3] == 69
    assert all(69 <= amount <= 95 for amount in found)


@pytest.mark.parametrize(
    ("overhead", "slope", "wave", "cliff_at", "fall", "speedup", "seed"),
    [
        (0.0032, 0.823, 15, 154, 0.08, 1.25, 82),
        (0.0691, 0.833, 22, 73, 0.0, 1.5, 108),
        (0.0136, 0.817, 23, 121, 0.08, 1.25, 142),
        *((0.02, 0.82, 10 + seed, 60 + 5 * seed, 0.05, 1.25 + 0.05 * seed, seed) for seed in range(6)),
    ],
)
def test_a_jump_past_the_target_comes_back(
    overhead: float, slope: float, wave: int, cliff_at: int, fall: float, speedup: float, seed: int
) -> None:
    """On noisy waves, on which a step too short may be followed by one to the very end."""

    def waves(amount: int) -> float:
        return 1 + overhead - slope * (amount // wave * wave) / 190 - (fall if amount >= cliff_at else 0)

    device = Device(waves, noise=0.02)
    device.random = np.random.default_rng(seed)
    found = device.search([1.1, 1.2, speedup], seconds=5.0)[speedup]
    best = waves(smallest(waves, speedup) or MOST)
    assert found.reached
    assert waves(amounts([found])[0]) >= 0.97 * best


def test_a_target_that_its_start_misses_does_not_end_at_the_amount_of_the_next_larger_target() -> None:
    """Where timing all variants in many rounds takes most of the time: few rounds settle the amounts before."""
    device, source = Device(straight), OrderedCandidates("pomt", removes, 1, MOST)
    targets = [target(source, speedup, start) for speedup, start in ((1.1, 20), (1.25, 46), (1.5, 84))]
    others = [Variant(POMT(), lp.Schedule.single(12, 5, 20 + 7 * number)) for number in range(9)]
    timer = device.timer()
    verify_targets(timer, targets, others, 51, 6.0, lambda: None)
    for each, speedup in zip(targets, (1.1, 1.25, 1.5), strict=True):
        assert is_smallest(amounts([each])[0], straight, speedup), speedup
        assert each.candidate is not None
        assert timer.result(each.candidate.variant).rounds > 20
    assert device.now < 6.5


def test_what_the_next_smaller_amount_reaches_is_said_where_a_target_is_passed() -> None:
    device, source = Device(cliff), OrderedCandidates("pomt", removes, 1, MOST)
    only, timer = target(source, 1.25, 90), device.timer()
    verify_targets(timer, [only], [], 31, 20.0, lambda: None)
    assert amounts([only]) == [69]
    assert only.overshoot(timer.result(removes(69).variant)) == "next smaller amount misses: 1.07x"
    smallest = target(OrderedCandidates("pomt", removes, 1, MOST), 1.02, 1)
    timer = Device(lambda _: 0.5).timer()
    verify_targets(timer, [smallest], [], 5, 5.0, lambda: None)
    assert amounts([smallest]) == [1]
    assert smallest.overshoot(timer.result(removes(1).variant)) == "the smallest amount"


def test_the_time_limit_is_kept_and_every_target_has_a_result() -> None:
    device = Device(straight)
    source = OrderedCandidates("pomt", removes, 1, MOST)
    search_targets(device.timer(), source, [lp.LatencyBudget(speedup=1.5)], 0.5, lambda: None)
    assert device.now < 0.6
    device = Device(straight)
    targets = [target(OrderedCandidates(f"{s}", removes, 1, MOST), s, 3) for s in (1.5, 2.0)]
    timer = device.timer()
    verify_targets(timer, targets, [Variant(weights=Int8Weights)], 51, 0.05, lambda: None)
    assert device.now < 4 * 4 * 0.01 * 1.2  # a warm-up and three rounds of four variants, whatever time they take
    assert timer.result(DENSE).rounds == 3
    assert [(t.reached, t.exhausted) for t in targets] == [(False, False)] * 2
    assert amounts(targets) == [3, 3]
    assert targets[0].best_speedup == pytest.approx(1 / straight(3), rel=0.01)  # the clock of this device drifts


def test_a_slow_variant_does_not_take_the_time_of_the_others() -> None:
    device = Device(straight, int8=40.0)
    timer = device.timer()
    source = OrderedCandidates("pomt", removes, 1, MOST)
    targets = [target(source, speedup, 3) for speedup in (1.25, 2.0)]
    verify_targets(timer, targets, [Variant(weights=Int8Weights)], 51, 20.0, lambda: None)
    assert device.now < 21
    assert all(target.reached for target in targets)
    assert targets[0].candidate is not None
    assert timer.result(targets[0].candidate.variant).rounds >= 50
    assert 3 <= timer.result(Variant(weights=Int8Weights)).rounds <= 10


def test_equal_amounts_are_timed_once() -> None:
    device = Device(cliff)
    timer = device.timer()
    source = OrderedCandidates("pomt", removes, 1, MOST)
    targets = [target(source, speedup, 69) for speedup in (1.25, 1.5, 1.75)]
    verify_targets(timer, targets, [], 4, 60.0, lambda: None)
    assert set(amounts(targets)) == {69}
    assert timer.result(removes(69).variant).rounds == 4


def test_the_noise_of_one_amount_is_no_cliff() -> None:
    """Isotonic regression: an amount that seems slower than smaller ones is averaged with them."""
    source = OrderedCandidates("pomt", removes, 1, 30)
    for amount, ratio in ((10, 0.8), (20, 0.84), (30, 0.6)):
        source.observe(source.candidate(amount), lp.profiling.LatencyStats(10 * ratio, 0.1, ratio, 0.01, 9))
    assert [source.ratio(amount) for amount in (0, 10, 15, 20, 30)] == pytest.approx([1, 0.82, 0.82, 0.82, 0.6])
    assert amount_grid(1, 30, 4) == [1, 11, 20, 30]


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
