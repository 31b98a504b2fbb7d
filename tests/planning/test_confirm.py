import pytest

from lightning_prune import AccuracyBudget, ArgumentError, LatencyBudget
from lightning_prune.planning.single_block import BudgetSearch, confirmed
from lightning_prune.profiling import LatencyStats


class Device:
    """Takes `slower` times what its profile says: tokens / 100 of dense."""

    def __init__(self, slower, lowest=20):
        self.slower, self.lowest, self.timed = slower, lowest, []

    def choose(self, objective):
        tokens = int(100 / objective.speedup) if isinstance(objective, LatencyBudget) else 50
        if tokens < self.lowest:
            raise ArgumentError("cannot be reached")
        return tokens, f"{tokens} by {objective}"

    def compare(self, tokens):
        self.timed.append(tokens)
        ratio = tokens / 100 * self.slower
        return LatencyStats(10.0, 0.1, 1.0, 0.0, 31), LatencyStats(10 * ratio, 0.1, ratio, 0.01, 31)

    def attempt(self, objective, dense_ms=10.0):
        fastest = lambda: (self.lowest, "the fastest")  # noqa: E731
        return BudgetSearch(self.choose(objective), 100, dense_ms, objective, self.choose, fastest)

    def confirmed(self, objective, dense_ms=10.0):
        return confirmed(self.attempt(objective, dense_ms), self.compare)


def test_what_meets_its_budget_stays():
    device = Device(1.0)
    found = device.confirmed(LatencyBudget(speedup=2))
    assert (found.tokens, device.timed) == (50, [50])
    assert found.pruned.ratio == 0.5


def test_a_budget_that_is_missed_is_chosen_for_again():
    device = Device(1.1)
    found = device.confirmed(LatencyBudget(speedup=2))
    assert device.timed == [50, 45]
    assert found.tokens == 45
    assert found.pruned.ratio == pytest.approx(0.495)
    assert "longer than" not in found.reason


def test_where_nothing_can_be_chosen_the_fastest_is_tried():
    device = Device(1.06, lowest=48)
    honest = device.compare
    device.compare = lambda tokens: honest(tokens if tokens == 50 else 47)  # faster than its profile says
    found = device.confirmed(LatencyBudget(speedup=2))
    assert (found.tokens, found.reason, device.timed) == (48, "the fastest", [50, 47])


def test_where_the_same_is_chosen_again_the_fastest_is_tried():
    device = Device(1.1)
    attempt = device.attempt(LatencyBudget(speedup=2))
    attempt._choose = lambda objective: (50, "the same, beyond a cliff")
    assert confirmed(attempt, device.compare).tokens == 20


def raising():
    raise ArgumentError("cannot be reached")


def test_a_budget_that_cannot_be_met_ends_with_the_fastest_and_says_by_how_much():
    device = Device(1.1, lowest=48)
    found = device.confirmed(LatencyBudget(speedup=2))
    assert (found.tokens, device.timed) == (48, [50, 48])
    told = "Timed beside dense it takes 5.6% longer than the latency budget, 2x: 1.89x is the best of the 2"
    assert told in found.reason


def test_half_a_percent_is_no_miss():
    device = Device(1.004)
    assert device.confirmed(LatencyBudget(speedup=2)).tokens == 50
    assert device.timed == [50]


class Milliseconds(Device):
    """Its profile says a millisecond for ten tokens; now it takes `slower` times that, dense as well."""

    def choose(self, objective):
        tokens = int(10 * objective.ms)
        if tokens < self.lowest:
            raise ArgumentError("cannot be reached")
        return min(tokens, 100), f"{tokens} by {objective}"

    def compare(self, tokens):
        self.timed.append(tokens)
        ratio = tokens / 100
        return LatencyStats(10 * self.slower, 0.1, 1.0, 0.0, 31), LatencyStats(
            10 * ratio * self.slower, 0.1, ratio, 0.01, 31
        )


def test_a_budget_of_milliseconds_gives_tokens_back_where_the_machine_is_faster_than_its_profile():
    device = Milliseconds(0.7)
    found = device.confirmed(LatencyBudget(ms=5))
    assert (found.tokens, device.timed) == (71, [50, 71])
    assert found.pruned.milliseconds == pytest.approx(4.97)


def test_a_budget_of_milliseconds_takes_tokens_where_the_machine_is_slower_than_its_profile():
    device = Milliseconds(1.25)
    assert (device.confirmed(LatencyBudget(ms=5)).tokens, device.timed) == (40, [50, 40])


def test_what_kept_to_the_budget_stays_where_more_tokens_do_not():
    device = Milliseconds(0.7)
    honest = device.compare

    def compare(tokens):
        dense, pruned = honest(tokens)
        return (dense, pruned) if tokens <= 50 else (dense, LatencyStats(6.0, 0.1, 6 / 7, 0.01, 31))

    device.compare = compare
    found = device.confirmed(LatencyBudget(ms=5))
    assert found.tokens <= 50
    assert found.pruned.milliseconds <= 5 * 1.005


def test_other_objectives_are_timed_once():
    device = Device(1.5)
    assert device.confirmed(AccuracyBudget(0.01)).tokens == 50
    assert device.timed == [50]


def test_dense_is_not_timed():
    device = Device(1.0)
    budget = LatencyBudget(speedup=2)
    attempt = BudgetSearch((100, "flat"), 100, 10.0, budget, device.choose, raising)
    assert attempt.next is None
    found = confirmed(attempt, device.compare)
    assert (found.tokens, found.reason, found.pruned, device.timed) == (100, "flat", None, [])
