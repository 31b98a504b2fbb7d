"""The time limit of a comparison is one for everything that is planned and timed, and it is kept."""

from typing import Any

import pytest

import lightning_prune as lp
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.comparison.comparison_planning import NOT_PLANNED, TimeShares
from lightning_prune.comparison.planned_variants import ComparisonPlan

from .conftest import clock_of

METHODS, SPEEDUPS = ["pomt", "tome", "auto", "random"], [1.1, 1.25, 1.5, 2.0]


def planned(module: Any, running: Any, seconds: float, **more: Any) -> tuple[lp.comparison.Comparison, float]:
    """A comparison, and seconds of a pass of the dense model."""
    trainer, _ = running(calibration=8, time_limit=seconds, method="pomt", limit_val_batches=1)
    clock = clock_of(module)
    found = lp.compare(trainer, module, lp.DigitsData(batch_size=8), clock=clock, **more)
    return found, 4 * 197 * 5e-4


def without_time(plan: ComparisonPlan) -> list[str]:
    return [each.variant for each in plan.planned if each.note == NOT_PLANNED]


@pytest.mark.long
def test_several_methods_at_several_speedups_end_in_time(clocked_module: Any, running: Any) -> None:
    found, per_pass = planned(clocked_module(), running, 120.0, methods=METHODS, speedups=SPEEDUPS)
    assert found.plan.seconds <= 120 + 4 * per_pass * len(found.rows)
    assert without_time(found.plan) == []
    assert {row.method for row in found.rows} == {"", *METHODS}
    assert min(row.timing.rounds for row in found.plan.planned if row.timing is not None) >= 3


def test_what_there_is_no_time_for_is_said_and_the_first_method_is_planned(clocked_module: Any, running: Any) -> None:
    found, per_pass = planned(clocked_module(), running, 1.0, methods=METHODS, speedups=SPEEDUPS)
    assert without_time(found.plan) == ["tome", "auto", "random"]
    rows = {row.variant: row for row in found.rows}
    assert rows["tome"].note == NOT_PLANNED
    assert (rows["tome"].method, rows["tome"].latency_ms, rows["tome"].images) == ("tome", None, 0)
    assert len([row for row in found.rows if row.method == "pomt"]) > 1
    # The curve, 20 passes of the search, and three rounds and a warm-up of each variant, and all are faster.
    assert found.plan.seconds <= 100 * per_pass


@pytest.mark.parametrize("seconds", [60.0, 20.0])
def test_objectives_share_the_limit_with_methods(seconds: float, clocked_module: Any, running: Any) -> None:
    found, per_pass = planned(clocked_module(), running, seconds, methods=["pomt", "topk"], objective=lp.Utility(0.5))
    assert found.plan.seconds <= max(seconds, 50 * per_pass) + 12 * per_pass
    assert without_time(found.plan) == ([] if seconds == 60 else ["topk utility"])


def test_objectives_of_one_method_are_planned_together(
    clocked_module: Any, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_prune.comparison import comparison_planning

    asked: list[list[str]] = []
    real = comparison_planning.planned_for

    def plan(config: Any, module: Any, images: Any, calibration: Any, objectives: Any, *more: Any) -> Any:
        asked.append([str(objective) for objective in objectives])
        return real(config, module, images, calibration, objectives, *more)

    monkeypatch.setattr(comparison_planning, "planned_for", plan)
    found, _ = planned(clocked_module(), running, 60.0, objective=lp.LatencyBudget(speedup=1.25))
    assert asked == [[str(lp.Utility(0.5)), str(lp.LatencyBudget(speedup=1.25))]]
    assert [row.variant for row in found.rows] == ["dense", "pomt utility", "pomt latency budget"]
    assert found.rows[2].speedup >= 1.25 * 0.99


def test_shares_of_what_is_left() -> None:
    now = [0.0]
    shares = TimeShares(TimeLimit(100, lambda: now[0]), {"a": 1.0, "b": 3.0, "c": 1.0, "last": 1.0}, reserved=10.0)
    assert shares.seconds("a") == pytest.approx(90 / 6)
    now[0] = 40.0
    assert shares.seconds("b", least=20.0) == pytest.approx(50 * 3 / 5)
    now[0] = 80.0
    assert shares.seconds("c", least=10.1) is None
    assert shares.seconds("last") == pytest.approx(20.0)
    late = TimeShares(TimeLimit(1, lambda: now[0]), {"a": 1.0, "b": 1.0, "last": 1.0}, reserved=5.0)
    now[0] = 90.0
    assert late.seconds("a", least=7.0) == 7.0  # the first task is done whatever time it takes
    assert late.seconds("b", least=0.1) is None
    assert late.seconds("last") == 0.0
