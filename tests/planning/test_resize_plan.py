"""Plans over the grids to which images can be scaled."""

import numpy as np
import pytest
from timm.models.vision_transformer import VisionTransformer

import lightning_prune as lp
from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning.dynamic_program import optimal_schedules
from lightning_prune.planning.method_selection import AUTO_METHODS, usable_methods
from lightning_prune.planning.probed_schedules import probe_schedules
from lightning_prune.planning.sensitivity import Sensitivity
from lightning_prune.reduction import Resize, TopK

from .clocked import DEPTH, IMAGES, N, clock, planned, vit  # noqa: F401
from .test_dynamic_program import check_against_all, mixed_problem

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


@pytest.mark.parametrize("seed", range(8))
def test_the_programme_goes_on_from_grids_as_all_schedules_do(seed):
    """The last of three methods acts before block 0, and leaves two of the counts."""
    levels, milliseconds, costs, dense_ms, weighs = mixed_problem(seed, (False, True, False), count=5)
    before = np.full_like(costs[:, 2], np.inf)
    before[:, range(5), range(5)] = 0.0
    before[0, -1, [1, 3]] = [0.15, 0.05]
    costs[:, 2] = before
    front = optimal_schedules(levels, milliseconds, costs, dense_ms, weighs)
    check_against_all(front, levels, milliseconds, costs, dense_ms, weighs)
    scaled = [point for point in front if point.methods[0] == 2]
    assert scaled
    assert {point.levels[0] for point in scaled} <= {levels[1], levels[3]}
    assert any(len({*point.methods} - {None}) > 1 for point in scaled)


def test_auto_goes_without_it_where_images_cannot_be_scaled():
    class OwnPositions(VisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x)

    model = vit(kind=OwnPositions)
    usable = usable_methods("auto", "all", find_vision_transformer(model))
    assert [*usable] == [name for name in AUTO_METHODS if name != "resize"]
    assert [*usable_methods("auto", "all", find_vision_transformer(vit()))] == [*AUTO_METHODS]
    with pytest.raises(lp.UnsupportedModelError, match="does not resample"):
        usable_methods("resize", "all", find_vision_transformer(model))


def test_probes_are_grids() -> None:
    for schedule in probe_schedules(Resize(), N, 1, [0], DEPTH):
        assert schedule.tokens(N)[0] in POSSIBLE


@pytest.mark.parametrize("speedup", [1.2, 1.5])
def test_a_plan_leaves_a_grid(speedup: float, clock: dict[str, float]) -> None:  # noqa: F811
    plan = planned(methods=["resize"], objective=lp.LatencyBudget(speedup=speedup))
    assert plan.method == "resize"
    assert plan.schedule.tokens(N)[0] in POSSIBLE, plan
