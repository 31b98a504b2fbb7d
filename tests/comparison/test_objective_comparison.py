"""Dense against pruned in one table: every row from a real validation, timings replaced by a fixed price of a token."""

import copy
from dataclasses import fields
from typing import Any

import lightning as L
import pytest
import torch

import lightning_prune as lp
from helpers.clock import set_latency
from helpers.models import digits_module
from lightning_prune.callbacks import TokenPruning
from lightning_prune.comparison.objective_comparison import _objectives, compare, ensure_output_dir
from lightning_prune.planning import Objective
from lightning_prune.planning.measurements import Measurements
from lightning_prune.report.rows import Row

COLUMNS = [
    *("variant", "method", "top1", "top1_change", "speedup", "latency_ms", "precision"),
    *("int8", "target_speedup", "block", "removed", "tokens", "top1_low", "top1_high", "top5", "agreement"),
    *("latency_spread", "speedup_spread", "throughput", "throughput_end_to_end"),
    *("joules_per_image", "watts", "images", "device", "batch_size", "note"),
]
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "limit_val_batches": 4,
}


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(alternative: Any) -> float:
        if isinstance(alternative, int):
            return alternative / 1e3
        return {"dense": 0.2, "pomt utility": 0.05}.get(alternative, 0.1)

    set_latency(monkeypatch, seconds)


def compared(
    model: L.LightningModule | None = None, max_drop: float | None = None, limit: int = 4, **settings: Any
) -> Any:
    defaults = {"method": "pomt", "objective": lp.Utility(), "calibration": 8, "time_limit": 1, "verbose": False}
    pruner = TokenPruning(**{**defaults, **settings})
    trainer = L.Trainer(callbacks=[pruner], **{**OPTIONS, "limit_val_batches": limit})
    model = model if model is not None else digits_module()
    rows, decisions, _ = compare(trainer, model, pruner.config, max_drop, datamodule=lp.DigitsData(batch_size=8))
    return rows, decisions, trainer, pruner


def test_over_blocks_all_objectives_share_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = Measurements.fronts
    monkeypatch.setattr(Measurements, "fronts", lambda self, methods: (made.append(self), real(self, methods))[1])
    rows, decisions, _, _ = compared(method="topk", block="auto")
    assert [row.variant for row in rows] == ["dense", "topk utility", "topk budget"]
    assert len(made) == 1
    plans = [decision.plan for decision in decisions.values()]
    assert [str(plan.objective)[:8] for plan in plans] == ["utility,", "accuracy"]
    assert plans[0].sensitivity_images == plans[1].sensitivity_images > 0


def test_columns_are_those_of_the_files() -> None:
    assert [field.name for field in fields(Row)] == COLUMNS


def test_dense_and_two_pruned_variants() -> None:
    model = digits_module()
    before = copy.deepcopy(model.state_dict())
    rows, decisions, trainer, pruner = compared(model)
    assert [row.variant for row in rows] == ["dense", "pomt utility", "pomt budget"]
    assert list(decisions) == ["pomt utility", "pomt budget"]
    dense, utility, budget = rows
    assert (dense.method, dense.block, dense.removed, dense.tokens, dense.speedup) == ("", "", 0, 197, 1.0)
    assert (utility.method, utility.block) == ("pomt", "1")
    assert utility.tokens == 197 - utility.removed < 197
    assert [row.latency_ms for row in (dense, utility)] == pytest.approx([200, 50])
    assert utility.speedup == pytest.approx(4.0)
    for row in rows:
        assert (row.images, row.batch_size, row.precision, row.latency_spread) == (32, 8, "float32", 0)
        assert row.throughput > 0
        assert row.throughput_end_to_end > 0
        assert list(row.to_dict()) == COLUMNS
    assert (dense.top1_change, dense.top1_low, dense.agreement, dense.speedup_spread) == (None, None, None, 0)
    for row in (utility, budget):
        assert row.top1_change == pytest.approx(row.top1 - dense.top1)
        assert row.top1_low < row.top1_change < row.top1_high
        assert 0 <= row.agreement <= 1
    assert budget.removed <= utility.removed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model.model.blocks[1]).__name__ == "Block"
    assert trainer.callbacks.count(pruner) == 1
    assert not [callback for callback in trainer.callbacks if type(callback).__name__ in ("Survey", "OutcomeRecorder")]
    assert (pruner.enabled, pruner.decision) == (True, None)


def test_rows_are_what_validation_itself_says() -> None:
    model = digits_module()
    rows, decisions, *_ = compared(model)
    data = lp.DigitsData(batch_size=8)
    (dense,) = L.Trainer(**OPTIONS).validate(model, data, verbose=False)
    assert (rows[0].top1, rows[0].top5) == (dense["val/top1"], dense["val/top5"])
    with lp.patch(model, "pomt", decisions["pomt utility"].schedule):
        (pruned,) = L.Trainer(**OPTIONS).validate(model, data, verbose=False)
    assert (rows[1].top1, rows[1].top5) == (pruned["val/top1"], pruned["val/top5"])


class DenseOnly(Objective):
    """Nothing is as good as dense."""

    def score(self, milliseconds: Any, accuracy: Any) -> Any:
        return (milliseconds == milliseconds[-1]).astype(float)

    def __str__(self) -> str:
        return "dense only"


def test_a_variant_that_removes_nothing_has_the_timing_of_dense() -> None:
    rows, decisions, *_ = compared(objective=DenseOnly())
    removed = {row.variant: row.removed for row in rows}
    nothing = [row for row in rows[1:] if not row.removed]
    assert nothing, removed
    for row in nothing:
        assert (row.latency_ms, row.latency_spread, row.speedup) == (rows[0].latency_ms, rows[0].latency_spread, 1.0)
        assert (row.tokens, row.block, row.top1) == (197, "", rows[0].top1)
        assert decisions[row.variant].speedup == 1.0


def test_a_given_schedule_is_the_only_variant() -> None:
    rows, decisions, _, pruner = compared(schedule=60, block=2)
    assert [row.variant for row in rows] == ["dense", "pomt given"]
    assert (rows[1].removed, rows[1].tokens, rows[1].block) == (60, 137, "2")
    assert rows[1].speedup == pytest.approx(2.0)
    assert decisions["pomt given"].plan is None
    assert pruner.config.schedule == 60


def test_several_reducing_blocks_are_listed() -> None:
    rows, *_ = compared(schedule=[10, 0, 20, 0])
    assert (rows[1].block, rows[1].removed) == ("0 2", 30)


def test_an_accuracy_budget_of_the_user_is_the_one_compared() -> None:
    rows, decisions, *_ = compared(objective=lp.AccuracyBudget(0.9))
    assert [row.variant for row in rows] == ["dense", "pomt budget"]
    assert decisions["pomt budget"].plan.objective == lp.AccuracyBudget(0.9)


@pytest.mark.parametrize(
    ("objective", "name"),
    [(lp.LatencyBudget(speedup=1.5), "latency budget"), (DenseOnly(), "dense only"), (lp.Utility(0.3), "utility")],
)
def test_a_variant_is_named_after_its_objective(objective: Objective, name: str) -> None:
    pruner = TokenPruning("pomt", objective=objective, verbose=False)
    assert list(_objectives(pruner.config, None)) == [f"pomt {name}", "pomt budget"]
    assert _objectives(pruner.config, None)[f"pomt {name}"] is objective


def test_one_profile_and_one_curve_serve_all_variants() -> None:
    _, decisions, *_ = compared(max_drop=0.5)
    utility, budget = (decision.plan for decision in decisions.values())
    assert utility.profile is budget.profile
    assert {c.schedule for c in utility.front} & {c.schedule for c in budget.front}
    assert budget.objective == lp.AccuracyBudget(0.5)


class Stop(Exception):
    pass


def settings_of(callback: L.Callback) -> dict[str, Any]:
    """All attributes but the two that Lightning puts on callbacks in a run."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}


def test_an_error_leaves_trainer_pruner_and_model_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(lp.ImageClassifier):
        runs = 0

        def on_validation_end(self) -> None:
            self.runs += 1
            if self.runs == 2:
                raise Stop

    torch.manual_seed(0)
    model = digits_module(Failing)
    pruner = TokenPruning("pomt", objective=lp.Utility(), calibration=8, time_limit=1, verbose=False)
    trainer, before = L.Trainer(callbacks=[pruner], **OPTIONS), settings_of(pruner)
    callbacks = list(trainer.callbacks)
    with pytest.raises(Stop):
        compare(trainer, model, pruner.config, 0.005, datamodule=lp.DigitsData(batch_size=8))
    assert model.runs == 2
    assert trainer.callbacks == callbacks
    assert settings_of(pruner) == before
    assert type(model.model.blocks[1]).__name__ == "Block"


def test_nothing_to_validate_is_an_error() -> None:
    with pytest.raises(lp.DataError, match=r"^The validation loader yielded no batch to compare on"):
        compared(limit=0)


class Plain(L.LightningModule):
    """Logs nothing of what the table has columns for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_module().model

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def test_a_module_that_logs_nothing_has_empty_columns() -> None:
    rows, *_ = compared(Plain(), schedule=60)
    for row in rows:
        assert (row.top1, row.top5, row.throughput, row.throughput_end_to_end) == (None, None, None, None)
        assert row.images == 32
    assert rows[1].agreement is not None  # the transformer itself returns logits, and the batches hold labels
    assert rows[1].top1_low < rows[1].top1_change < rows[1].top1_high


def test_writable(tmp_path: Any) -> None:
    assert ensure_output_dir(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("old")
    with pytest.raises(lp.ArgumentError, match=r"^`output` must be a folder that can be written to, got .*file"):
        ensure_output_dir(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"


def test_a_variant_that_is_not_faster_in_the_final_run_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_latency(monkeypatch, lambda alternative: alternative / 1e3 if isinstance(alternative, int) else 0.2)
    rows, decisions, *_ = compared()
    assert [(row.removed, row.tokens, row.speedup) for row in rows] == [(0, 197, 1.0)] * 3
    assert "nothing is gained" in decisions["pomt utility"].reason
    assert len({row.top1 for row in rows}) == 1


def test_says_how_long_deciding_took() -> None:
    pruner = TokenPruning("pomt", schedule=20, time_limit=1, verbose=False)
    trainer = L.Trainer(callbacks=[pruner], **OPTIONS)
    assert compare(trainer, digits_module(), pruner.config, datamodule=lp.DigitsData(batch_size=8)).seconds > 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"objective": lp.AccuracyBudget(0.1)}, "the objective is accuracy budget, at most 10% lost"),
        ({"schedule": 20}, "the schedule is given"),
    ],
)
def test_a_budget_that_nothing_is_planned_for(settings: dict[str, Any], why: str) -> None:
    pruner = TokenPruning(verbose=False, **settings)
    with pytest.raises(lp.ArgumentError, match=f"`max_drop` plays no part where {why}; got max_drop=0.01"):
        compare(L.Trainer(**OPTIONS), digits_module(), pruner.config, 0.01, datamodule=lp.DigitsData(batch_size=8))
