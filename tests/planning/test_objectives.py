import numpy as np
import pytest

from lightning_prune import AccuracyBudget, ArgumentError, LatencyBudget, Utility
from lightning_prune.planning.objectives import RATIO_TOLERANCE
from lightning_prune.profiling import DENSE_ACCURACY, Estimate, LatencyStats

LATENCY = np.array([4.0, 6.0, 9.0, 10.0])  # ascending tokens, dense last
ACCURACY = np.array([0.5, 0.9, 0.996, 1.0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_utility_is_the_papers_formula(alpha):
    expected = [alpha * (1 - ms / 10.0) + (1 - alpha) * a / 1.0 for ms, a in zip(LATENCY, ACCURACY, strict=True)]
    assert Utility(alpha).score(LATENCY, ACCURACY).tolist() == pytest.approx(expected)


def test_utility_normalises_by_the_maximum_of_each_curve():
    """Pruned points can be slower or more accurate than dense."""
    latency, accuracy = np.array([12.0, 10.0]), np.array([1.1, 1.0])
    assert Utility(0.5).score(latency, accuracy).tolist() == pytest.approx([0.5, 0.5 * (1 - 10 / 12) + 0.5 / 1.1])


@pytest.mark.parametrize(("alpha", "best"), [(0.0, 3), (0.5, 1), (1.0, 0)])
def test_utility_trades_by_alpha(alpha, best):
    assert Utility(alpha).best(LATENCY, ACCURACY) == best


def test_of_equals_the_most_tokens_win():
    assert Utility(0.0).best(LATENCY, np.ones(4)) == 3


@pytest.mark.parametrize(("max_drop", "best"), [(0.0, 3), (0.005, 2), (0.1, 1), (0.6, 0)])
def test_budget_takes_the_fastest_point_inside(max_drop, best):
    assert AccuracyBudget(max_drop).best(LATENCY, ACCURACY) == best


def test_budget_judges_by_latency_and_not_by_tokens():
    """Past a cliff the other way round: more tokens, less time."""
    assert AccuracyBudget(0.5).best(np.array([8.0, 6.0, 10.0]), np.array([0.9, 0.95, 1.0])) == 1


def test_dense_is_always_inside():
    assert AccuracyBudget(0.001).best(LATENCY, np.array([0.1, 0.2, 0.3, 0.9])) == 3


def test_a_confidence_judges_by_the_lower_bound():
    """1.2816 standard errors below the mean for 90%."""
    measured = [Estimate(0.998, 0.002), Estimate(0.999, 0.004), DENSE_ACCURACY]
    judged = AccuracyBudget(0.005, confidence=0.9).judged(measured)
    assert judged.tolist() == pytest.approx([0.998 - 1.2816 * 0.002, 0.999 - 1.2816 * 0.004, 1.0], abs=1e-6)
    assert AccuracyBudget(0.005).judged(measured).tolist() == [0.998, 0.999, 1.0]


def test_what_has_no_standard_error_is_within_no_budget_of_a_confidence():
    few = [Estimate(1.0), DENSE_ACCURACY]
    latency = np.array([5.0, 10.0])
    cautious = AccuracyBudget(0.005, confidence=0.95)
    assert cautious.best(latency, cautious.judged(few)) == 1
    assert AccuracyBudget(0.005).best(latency, AccuracyBudget(0.005).judged(few)) == 0


@pytest.mark.parametrize(("confidence", "tolerated"), [(0.5, True), (0.95, False)])
def test_tolerates_by_the_confidence(confidence, tolerated):
    assert AccuracyBudget(0.005, confidence).tolerates(Estimate(0.996, 0.002), 1.0) is tolerated


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan"), "high", True])
def test_confidence_outside_its_range(confidence):
    with pytest.raises(ArgumentError, match=r"`confidence` must be a number in \[0.5, 1\), got"):
        AccuracyBudget(0.005, confidence)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "half", True])
def test_alpha_outside_the_unit_interval(alpha):
    with pytest.raises(ArgumentError, match=r"`alpha` must be a number in \[0, 1\], got"):
        Utility(alpha)


@pytest.mark.parametrize("max_drop", [-0.1, 1.0, float("nan"), "half", True])
def test_drop_outside_the_unit_interval(max_drop):
    with pytest.raises(ArgumentError, match=r"`max_drop` must be a number in \[0, 1\), got"):
        AccuracyBudget(max_drop)


def test_objectives_say_what_they_are():
    assert str(Utility(0.3)) == "utility, alpha 0.3"
    assert str(AccuracyBudget(0.005)) == "accuracy budget, at most 0.5% lost"


@pytest.mark.parametrize(
    ("budget", "best"),
    [
        ({"ms": 9.5}, 2),
        ({"ms": 6.0}, 1),
        ({"ms": 4.0}, 0),
        ({"ms": 99}, 3),
        ({"speedup": 1.1}, 2),
        ({"speedup": 2}, 0),
        ({"ms": 5.98}, 1),
    ],
)
def test_latency_budget_takes_the_most_accurate_point_inside(budget, best):
    assert LatencyBudget(**budget).best(LATENCY, ACCURACY) == best


def test_a_latency_budget_that_nothing_meets_names_the_fastest():
    message = "The latency budget, 3 ms cannot be reached: the fastest candidate is predicted to take 4 ms, 2.50x."
    assert LatencyBudget(ms=3).infeasible_reason(LATENCY) == message
    assert "latency budget, 3x" in LatencyBudget(speedup=3).infeasible_reason(LATENCY)
    assert LatencyBudget(speedup=2.5).infeasible_reason(LATENCY) is None
    assert Utility().infeasible_reason(LATENCY) is None
    assert AccuracyBudget(0).infeasible_reason(LATENCY) is None


def test_a_budget_on_the_tail_says_the_latency_there():
    budget = LatencyBudget(ms=3, percentile=90)
    assert budget.latency_text(4.0, 5.0) == "5 ms at the 90th percentile"
    assert budget.latency_text(4.0) == "4 ms at the median"
    known = budget.with_tail_of(LatencyStats(10.0, 0.1, 1.0, 0.0, 31, p90_ms=12.5))
    assert known.latency_text(4.0) == "5 ms at the 90th percentile"
    unmet = "the fastest candidate is predicted to take 5 ms at the 90th percentile, 2.50x"
    assert unmet in known.infeasible_reason(LATENCY)
    assert LatencyBudget(ms=3).latency_text(4.0, 5.0) == Utility().latency_text(4.0, 5.0) == "4 ms"


def test_the_violation_of_a_latency_budget():
    timing = LatencyStats(milliseconds=6.0, spread=0.1, ratio=0.6, ratio_spread=0.01, rounds=31)
    assert LatencyBudget(ms=5).violation(timing) == pytest.approx(0.2)
    assert LatencyBudget(speedup=2).violation(timing) == pytest.approx(0.2)
    assert LatencyBudget(ms=6).violation(timing) == 0
    assert LatencyBudget(ms=12).violation(timing) == pytest.approx(-0.5)
    assert Utility().violation(timing) == AccuracyBudget(0).violation(timing) == 0


def test_a_budget_on_the_tail_bounds_the_90th_percentile():
    budget = LatencyBudget(ms=5, percentile=90)
    timing = LatencyStats(milliseconds=4.0, spread=0.1, ratio=0.4, ratio_spread=0.01, rounds=31, p90_ms=6.0)
    assert budget.violation(timing) == pytest.approx(0.2)
    assert LatencyBudget(ms=5).violation(timing) == pytest.approx(-0.2)
    assert str(budget) == "latency budget, 5 ms at the 90th percentile"
    # What is not timed varies as the dense model does.
    dense = LatencyStats(milliseconds=10.0, spread=0.1, ratio=1.0, ratio_spread=0.0, rounds=31, p90_ms=12.5)
    known = budget.with_tail_of(dense)
    assert known == budget
    assert (known.limit_ms(10.0), budget.limit_ms(10.0)) == (4.0, 5)
    assert known.best(np.array([3.0, 4.5, 10.0]), np.array([0.8, 0.9, 1.0])) == 0
    assert (known.dense_is_feasible(4.0), known.dense_is_feasible(4.5)) == (True, False)
    without = LatencyStats(milliseconds=4.8, spread=0.1, ratio=0.48, ratio_spread=0.01, rounds=1)
    assert known.violation(without) == pytest.approx(0.2)
    assert "take 6.25 ms at the 90th percentile, 2.00x" in known.infeasible_reason(np.array([5.0, 10.0]))
    for other in (LatencyBudget(ms=5), LatencyBudget(speedup=2), AccuracyBudget(0), Utility()):
        assert other.with_tail_of(dense) is other


def test_the_limit_of_a_latency_budget():
    assert LatencyBudget(ms=6).limit_ms(99.0) == 6
    assert LatencyBudget(speedup=2).limit_ms(99.0) == 49.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of `ms` and `speedup`, got ms=None, speedup=None"),
        ({"ms": 5, "speedup": 2}, "one of `ms` and `speedup`, got ms=5, speedup=2"),
        ({"ms": 0}, "`ms` must be a finite number > 0, got 0"),
        ({"ms": "fast"}, "`ms` must be a finite number > 0, got 'fast'"),
        ({"ms": float("inf")}, "`ms` must be a finite number > 0, got inf"),
        ({"speedup": 1}, "`speedup` must be a finite number > 1, got 1"),
        ({"speedup": float("nan")}, "`speedup` must be a finite number > 1, got nan"),
        ({"ms": 5, "percentile": 75}, "`percentile` must be 50 or 90, got 75"),
        ({"speedup": 2, "percentile": 90}, "`percentile` must be 50 with `speedup`, got 90"),
        ({"speedup": True}, "`speedup` must be a finite number > 1, got True"),
    ],
)
def test_latency_budget_refuses(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        LatencyBudget(**arguments)


def test_numbers_of_numpy_are_numbers():
    assert Utility(np.float32(0.5)) == Utility(0.5)
    assert AccuracyBudget(np.float32(0.25)) == AccuracyBudget(0.25)
    assert LatencyBudget(ms=np.float32(5.0)) == LatencyBudget(ms=5)
    assert LatencyBudget(speedup=np.int64(2)) == LatencyBudget(speedup=2)


def test_predictions_and_timings_have_one_tolerance():
    budget = LatencyBudget(speedup=2)
    for ratio, inside in ((0.5, True), (0.502, True), (0.5024, True), (0.503, False)):
        timing = LatencyStats(10 * ratio, 0.1, ratio, 0.01, 31)
        assert (budget.violation(timing) <= RATIO_TOLERANCE) == inside
        assert np.isfinite(budget.score(np.array([10 * ratio, 10.0]), np.ones(2))[0]) == inside


def test_whether_dense_keeps_to_a_budget():
    assert (LatencyBudget(ms=5).dense_is_feasible(5.0), LatencyBudget(ms=5).dense_is_feasible(6.0)) == (True, False)
    assert not LatencyBudget(speedup=1.2).dense_is_feasible(5.0)
    assert AccuracyBudget(0).dense_is_feasible(5.0)
    assert Utility(1.0).dense_is_feasible(5.0)


def test_of_candidates_that_lose_nothing_a_latency_budget_takes_the_one_that_removes_the_fewest_tokens() -> None:
    latency, accuracy = np.array([2.0, 4.0, 6.0, 10.0]), np.array([1.02, 1.001, 1.0, 1.0])
    budget = LatencyBudget(speedup=1.5)
    assert budget.best(latency, accuracy) == 2
    assert budget.score_feasible(latency, accuracy).tolist() == [1.0] * 4
    assert budget.best(latency, np.array([1.02, 0.999, 0.99, 1.0])) == 0
