"""Plans over the grids to which images can be scaled."""

import pytest

import lightning_prune as lp
from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning.probed_schedules import probe_schedules
from lightning_prune.planning.sensitivity import Sensitivity
from lightning_prune.reduction import Resize, TopK

from .clocked import DEPTH, IMAGES, N, clock, planned, vit  # noqa: F401

POSSIBLE = [2, 3, 5, 7, 10, 13]


def test_sensitivities_are_of_grids() -> None:
    found = Sensitivity(find_vision_transformer(vit()), Resize(), [0], range(2, 18), N)
    assert found.counts == [*POSSIBLE, N]
    found.add(IMAGES[:4])
    assert (found.table[0, :-1] > 0).all()
    costs = found.costs([5, 8, 13, 17], DEPTH, lambda tokens: tokens - 2)
    assert [value < float("inf") for value in costs[0, -1]] == [True, False, True, True]
    other = Sensitivity(find_vision_transformer(vit()), TopK(), [0], [4, 9, 12], N)
    assert other.counts == [4, 9, 12, N]


def test_grids_are_planned_on_a_curve_that_was_measured_at_other_counts(clock):  # noqa: F811
    counts = (2, 4, 9, 12, N)
    curve = lp.LatencyProfile(
        counts, tuple(DEPTH * float(c) for c in counts), (1e-3,) * 5, (9,) * 5, "random", 0, DEPTH
    )
    plan = planned(methods=["resize"], objective=lp.LatencyBudget(speedup=1.2), profile=curve)
    assert plan.schedule.tokens(N)[0] == 13


def test_probes_are_grids() -> None:
    for schedule in probe_schedules(Resize(), N, 1, [0], DEPTH):
        assert schedule.tokens(N)[0] in POSSIBLE


@pytest.mark.parametrize("speedup", [1.2, 1.5])
def test_a_plan_leaves_a_grid(speedup: float, clock: dict[str, float]) -> None:  # noqa: F811
    plan = planned(methods=["resize"], objective=lp.LatencyBudget(speedup=speedup))
    assert plan.method == "resize"
    assert plan.schedule.tokens(N)[0] in POSSIBLE, plan
