"""The interval against a likelihood maximised by brute force, and its coverage counted out."""

import math
from itertools import product

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune.comparison.paired_statistics import agreement, paired_difference, paired_interval

Z = 1.959963984540054


def naive_score(gained: int, lost: int, n: int, delta: float) -> float:
    """The score test written from its definition: the likeliest p(lost) on a fine grid, zoomed in twice."""
    low, high = max(0.0, -delta), (1 - delta) / 2

    def log_likelihood(p: float) -> float:
        parts = ((gained, p + delta), (lost, p), (n - gained - lost, 1 - 2 * p - delta))
        return sum(count * math.log(max(share, 1e-300)) for count, share in parts if count)

    for _ in range(6):
        grid = np.linspace(low, high, 201)
        best = int(np.argmax([log_likelihood(p) for p in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 200)]
    p = (low + high) / 2
    return (gained - lost - n * delta) / math.sqrt(n * (p + (p + delta) - delta**2))


@pytest.mark.parametrize(("gained", "lost", "n"), [(4, 12, 200), (0, 3, 40), (7, 0, 25), (5, 5, 30), (1, 2, 1000)])
def test_ends_are_where_the_score_test_begins_to_refute(gained: int, lost: int, n: int) -> None:
    found = paired_interval(gained, lost, n)
    assert found.change == pytest.approx((gained - lost) / n)
    assert found.low < found.change < found.high
    assert naive_score(gained, lost, n, found.low) == pytest.approx(Z, abs=2e-3)
    assert naive_score(gained, lost, n, found.high) == pytest.approx(-Z, abs=2e-3)


@pytest.mark.parametrize("n", [1, 10, 2000])
def test_no_discordant_image_is_no_certainty(n: int) -> None:
    found = paired_interval(0, 0, n)
    limit = Z**2 / (n + Z**2)  # closed form of the score interval where nothing differs
    assert (found.change, found.low, found.high) == pytest.approx((0.0, -limit, limit), abs=1e-9)


def test_swapping_the_variants_mirrors_the_interval() -> None:
    for gained, lost, n in [(0, 5, 50), (3, 9, 400), (10, 0, 10)]:
        one, other = paired_interval(gained, lost, n), paired_interval(lost, gained, n)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)


def test_everything_lost_and_everything_gained() -> None:
    assert paired_interval(0, 20, 20).low == pytest.approx(-1.0)
    assert -1 < paired_interval(0, 20, 20).high < -0.5
    assert paired_interval(20, 0, 20).high == pytest.approx(1.0)


def test_agrees_with_the_normal_interval_where_counts_are_large() -> None:
    gained, lost, n = 900, 1400, 50_000
    change = (gained - lost) / n
    error = math.sqrt((gained + lost) / n - change**2) / math.sqrt(n)
    found = paired_interval(gained, lost, n)
    assert (found.low, found.high) == pytest.approx((change - Z * error, change + Z * error), abs=2e-5)


@pytest.mark.parametrize(("p_gained", "p_lost"), [(0.02, 0.02), (0.01, 0.06), (0.0, 0.03), (0.15, 0.1)])
def test_coverage_counted_over_all_outcomes(p_gained: float, p_lost: float) -> None:
    """Every outcome of 60 images with its probability: the true difference lies inside about 95% of the time."""
    n, covered, normal = 60, 0.0, 0.0
    same = 1 - p_gained - p_lost
    for gained, lost in product(range(26), repeat=2):
        if (p_gained == 0 and gained) or gained + lost > n:
            continue
        rest = n - gained - lost
        ways = math.comb(n, gained) * math.comb(n - gained, lost)
        chance = ways * p_gained**gained * p_lost**lost * same**rest
        if chance < 1e-9:
            continue
        found, truth = paired_interval(gained, lost, n), p_gained - p_lost
        covered += chance * (found.low <= truth <= found.high)
        half = Z * math.sqrt((gained + lost) / n - ((gained - lost) / n) ** 2) / math.sqrt(n)
        normal += chance * (abs((gained - lost) / n - truth) <= half)
    assert 0.93 < covered <= 1
    assert covered > normal - 0.01  # the textbook interval falls short where little differs


def test_from_outcomes() -> None:
    dense = np.array([1, 1, 1, 0, 0, 1], dtype=bool)
    pruned = np.array([1, 0, 0, 1, 0, 1], dtype=bool)
    assert paired_difference(dense, pruned) == paired_interval(1, 2, 6)
    assert paired_difference(dense, dense).change == 0
    assert agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 0.75


@pytest.mark.parametrize("arguments", [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_counts(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(lp.ArgumentError, match="`gained` and `lost` must be counts of `images` >= 1, got"):
        paired_interval(*arguments)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_impossible_confidence(confidence: float) -> None:
    with pytest.raises(lp.ArgumentError, match=r"`confidence` must be in \(0, 1\), got"):
        paired_interval(1, 1, 5, confidence)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_other_images(first: list[bool], second: list[bool]) -> None:
    for function in (paired_difference, agreement):
        with pytest.raises(lp.ArgumentError, match="must be of the same images, got"):
            function(first, second)
