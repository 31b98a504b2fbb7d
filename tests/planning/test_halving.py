"""Which methods are left out after a few images: by synthetic sensitivities whose standard errors are known."""

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune.planning.halving import TUNING, MeasuredMethod, dominated_methods
from lightning_prune.planning.latency_model import NO_OVERHEAD, ReductionOverhead
from lightning_prune.planning.mixed_latency import MixedLatency

from .simulated_search import DENSE_MS, DEPTH, LEVELS, costs, latency

OBJECTIVES = [
    lp.LatencyBudget(speedup=1.5),
    lp.LatencyBudget(ms=DENSE_MS / 1.3),
    lp.AccuracyBudget(0.01),
    lp.Utility(0.5),
]
GROUPS = 8
COMMON = np.random.default_rng(0).normal(0, 0.5, GROUPS)  # groups of images differ more than methods do


def measured(scale, noise=0.0, seed=1, overhead=NO_OVERHEAD, base=None, groups=GROUPS, common=1.0):
    """A method that costs `scale` times as much, and by how much that varies over the groups of images.

    Args:
        scale: Over the costs of `base`.
        noise: Standard deviation over the groups, over `base`, of this method alone.
        seed: Of that noise.
        overhead: Of the method.
        base: (depth, levels, levels) costs.
        groups: Number of groups.
        common: How much of what makes groups differ for all methods it has.
    """
    base = costs() if base is None else base
    own = np.random.default_rng(seed).normal(0, 1, groups)
    own = noise * (own - own.mean()) / own.std(ddof=1)
    factors = scale + own + scale * common * (COMMON[:groups] - COMMON[:groups].mean())
    without = [base * (factors.sum() - factor) / (groups - 1) for factor in factors]
    return MeasuredMethod(MixedLatency((latency(overhead),), (False,)), base * factors.mean(), without)


def found(objective, **methods):
    return dominated_methods(methods, LEVELS.tolist(), [objective])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_method_that_is_surely_worse_is_left_out_and_the_better_one_is_named(objective):
    methods = {"tome": measured(1.0, 0.1), "topk": measured(1.6, 0.1, seed=2), "pomt": measured(3.0, 0.1, seed=3)}
    assert found(objective, **methods) == {"topk": ("tome",), "pomt": ("tome",)}
    assert found(objective, **dict(reversed(methods.items()))) == found(objective, **methods)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("sigmas", "is_worse"), [(0.5, False), (1.9, False), (6.0, True)])
def test_within_two_standard_errors_a_method_stays(objective, sigmas, is_worse):
    """The groups are alike but for the noise of one method, and its standard error follows."""
    noise = 0.1
    one, other = measured(1.0, common=0.0), measured(1.0 + sigmas * noise / np.sqrt(GROUPS), noise, common=0.0)
    assert found(objective, tome=one, topk=other) == ({"topk": ("tome",)} if is_worse else {})


def test_images_that_are_hard_for_all_methods_do_not_hide_which_is_better():
    """The groups differ by half of the cost, the methods by as much: not paired, nothing could be said."""
    budget = lp.LatencyBudget(speedup=1.5)
    assert found(budget, tome=measured(1.0), topk=measured(1.5)) == {"topk": ("tome",)}
    turned = measured(1.5, common=-1.0)  # hard where the other is easy
    assert found(budget, tome=measured(1.0), topk=turned) == {}


def test_methods_are_compared_at_equal_latency():
    """Twice as accurate at equal counts, but so slow that fewer tokens can be kept."""
    slow = measured(0.5, 0.01, overhead=ReductionOverhead(per_block=12.0))
    assert found(lp.LatencyBudget(speedup=1.5), tome=slow, topk=measured(1.0, 0.01)) == {"tome": ("topk",)}
    near = measured(0.5, 0.01, overhead=ReductionOverhead(per_block=0.1))
    assert found(lp.LatencyBudget(speedup=1.5), tome=near, topk=measured(1.0, 0.01)) == {"topk": ("tome",)}


def test_a_method_that_cannot_reach_a_budget_is_left_out_for_one_that_can():
    budget, topk = lp.LatencyBudget(speedup=2.0), measured(1.0, 0.01)
    assert found(budget, tome=measured(20.0, 0.01, base=costs(most=1)), topk=topk) == {"tome": ("topk",)}
    assert found(budget, tome=measured(0.5, 0.01, base=costs(most=1)), topk=topk) == {}  # together they are better


def test_a_method_stays_where_a_schedule_of_several_needs_it():
    """It is the best one in the last block alone, and bad before."""
    early, late = costs(), costs()
    early[-1] *= 30.0
    late[:-1] *= 30.0
    late[-1] *= 0.01
    tome, topk = measured(1.0, 0.01, base=early), measured(1.0, 0.01, seed=2, base=late)
    assert found(lp.LatencyBudget(speedup=1.5), tome=tome, topk=topk) == {}
    alone = late.copy()
    alone[-1] *= 1e5  # nor there any more
    without = measured(1.0, 0.01, seed=2, base=alone)
    assert found(lp.LatencyBudget(speedup=1.5), tome=tome, topk=without) == {"topk": ("tome",)}


def test_nothing_is_left_out_for_nothing():
    tome, topk = measured(1.0, 0.1), measured(3.0, 0.1)
    assert dominated_methods({"tome": tome, "topk": topk}, LEVELS.tolist(), []) == {}
    assert found(OBJECTIVES[0], topk=topk) == {}
    few = TUNING.min_groups - 1
    assert found(OBJECTIVES[0], tome=measured(1.0, groups=few), topk=measured(3.0, groups=few)) == {}
    harmless = measured(3.0, 0.1, base=1e-7 * costs())
    assert found(OBJECTIVES[0], tome=measured(1.0, 0.1, base=1e-7 * costs()), topk=harmless) == {}
    assert len(tome.without) == GROUPS
    assert tome.costs.shape[0] == DEPTH
