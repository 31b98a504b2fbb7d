"""Looking closer around the best count: the point that is chosen in the end, against an exhaustive search."""

import numpy as np
import pytest

from lightning_prune import AccuracyBudget, LatencyBudget, LatencyProfile, Utility
from lightning_prune.planning.single_block import promising_gaps, refine

N = 197


def profile(latency, counts):
    tokens = tuple(sorted({*counts, N}))
    return LatencyProfile(
        tokens, tuple(latency(c) for c in tokens), (1e-3,) * len(tokens), (31,) * len(tokens), "pomt", 3, 12
    )


class Curve:
    """A proxy that is known at a few counts, as after a first choice."""

    def __init__(self, accuracy, counts):
        self.values = {count: accuracy(count) for count in counts} | {N: 1.0}


def stairs(tokens):
    return 4.0 + 0.002 * tokens + 1.5 * sum(tokens > edge for edge in (40, 77, 118, 150, 181))


def straight(tokens):
    return 4.0 + 0.03 * tokens


def loss(tokens):
    return 1 - 0.5 * ((N - tokens) / N) ** 3


def searched(latency, objective, grid):
    """The best count after refinement, by what is measured then."""
    asked = []

    def measure(counts):
        asked.append(set(counts))
        return profile(lambda count: 1.3 * latency(count), counts)  # the machine has become slower meanwhile

    found = refine(profile(latency, grid), Curve(loss, range(20, N, 8)), objective, measure, lambda: True)
    milliseconds = np.array(found.milliseconds)
    best = found.tokens[objective.best(milliseconds, np.array([loss(count) for count in found.tokens]))]
    return best, found, asked


@pytest.mark.parametrize("objective", [Utility(), Utility(0.3), AccuracyBudget(0.02), LatencyBudget(speedup=1.4)])
@pytest.mark.parametrize("latency", [stairs, straight])
def test_finds_nearly_what_an_exhaustive_search_finds(objective, latency):
    best, found, asked = searched(latency, objective, range(24, N, 8))
    counts = list(range(20, N + 1))
    scores = objective.score(np.array([latency(c) for c in counts]), np.array([loss(c) for c in counts]))
    assert scores[counts.index(best)] >= scores.max() - 0.004
    assert len(asked) <= 8
    assert len(found.tokens) <= 24 + 16


def test_new_counts_are_on_the_scale_of_the_profile():
    _, found, asked = searched(stairs, Utility(), range(24, N, 8))
    assert asked
    for count in found.tokens:
        assert found.latency_ms(count) == pytest.approx(stairs(count))


def test_nothing_is_measured_where_nothing_can_be_better():
    _, found, asked = searched(straight, Utility(), range(20, N))
    assert asked == []
    assert found.tokens == tuple(range(20, N + 1))


def test_nothing_is_measured_on_a_flat_curve():
    assert promising_gaps(profile(lambda count: 10.0, range(24, N, 8)), {N: 1.0}, Utility()) == []


def test_time_is_respected():
    calls = []
    first = profile(stairs, range(24, N, 8))
    found = refine(first, Curve(loss, range(20, N, 8)), Utility(), calls.append, lambda: False)
    assert found is first
    assert calls == []
