import numpy as np
import pytest

from lightning_prune import AccuracyBudget, ArgumentError, Utility

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
