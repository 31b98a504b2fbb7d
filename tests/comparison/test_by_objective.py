"""Schedules that an objective plans, and schedules that are given, among the variants of a comparison."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_prune as lp
from helpers.clock import TickingClock, set_latency
from helpers.models import digits_module
from lightning_prune.callbacks import TokenPruning
from lightning_prune.comparison.comparison_planning import ComparisonPlanner
from lightning_prune.planning import Objective
from lightning_prune.profiling import LatencyProfile
from lightning_prune.schedule import KeepRates

from .conftest import OPTIONS, clock_of


@pytest.fixture
def module(clocked_module: Callable[..., Any]) -> Callable[..., Any]:
    return clocked_module


def data() -> lp.DigitsData:
    return lp.DigitsData(batch_size=8)


def run(module: Any, running: Any, output: Path | None = None, **more: Any) -> Any:
    arguments = {name: more.pop(name) for name in ("methods", "objective", "resume", "on_message") if name in more}
    trainer, _ = running(**{"calibration": 8, "method": "pomt", **more})
    model = module if isinstance(module, L.LightningModule) else module()
    return lp.compare(trainer, model, data(), output=output, clock=clock_of(model), **arguments)


class Anew(Exception):
    """The first message of a comparison that is not run any further."""


def stop_at_once(message: str) -> None:
    raise Anew(message)


class DenseOnly(Objective):
    """Nothing is as good as dense."""

    def score(self, milliseconds: Any, accuracy: Any) -> Any:
        return (milliseconds == milliseconds[-1]).astype(float)

    def __str__(self) -> str:
        return "dense only"


@pytest.mark.long
def test_the_objective_of_the_callback_and_the_papers_own_choice(module: Any, running: Any, tmp_path: Path) -> None:
    model = module()
    before = copy.deepcopy(model.state_dict())
    found = run(model, running, tmp_path, method="topk", objective=lp.AccuracyBudget(0.5))
    assert [row.variant for row in found.rows] == ["dense", "pomt utility", "topk accuracy budget"]
    assert [row.method for row in found.rows] == ["", "pomt", "topk"]
    dense, utility, budget = found.rows
    assert (dense.block, dense.removed, dense.tokens, dense.speedup) == ("", 0, 197, 1.0)
    for row in (utility, budget):
        assert (row.target_speedup, row.block, row.tokens) == (None, "1", 197 - row.removed)
        assert row.speedup == pytest.approx(788 / (3 * 197 - 2 * row.removed + 1)), "one token leaves the last block"
        assert row.top1_change == pytest.approx(row.top1 - dense.top1)
        assert row.top1_low < row.top1_change < row.top1_high
        assert (row.images, row.batch_size, row.precision) == (16, 8, "float32")
    assert budget.removed > 0
    assert found.plan.planned[2].plan["met"]
    plans = [planned.plan for planned in found.plan.planned]
    assert plans[0] is None
    assert [plan["objective"] for plan in plans[1:]] == [str(lp.Utility(0.5)), str(lp.AccuracyBudget(0.5))]
    for plan in plans[1:]:
        assert plan["calibration"].startswith("8 images sampled from the dataset, seed 0")
    assert found.plan.calibration == "8 images sampled from the dataset, seed 0"
    assert isinstance(found.plan.profile, LatencyProfile)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.model.blocks[1]).__name__ == "Block"
    (unpruned,) = L.Trainer(**OPTIONS).validate(model, data(), verbose=False)
    assert (dense.top1, dense.top5) == (unpruned["val/top1"], unpruned["val/top5"])
    with lp.patch(model, "pomt", found.plan.planned[1].schedule):
        (pruned,) = L.Trainer(**OPTIONS).validate(model, data(), verbose=False)
    assert (utility.top1, utility.top5) == (pruned["val/top1"], pruned["val/top5"])


def test_the_callback_is_not_touched(module: Any, running: Any) -> None:
    trainer, pruner = running(calibration=8, method="pomt", objective=lp.Utility(0.5))
    callbacks, config = list(trainer.callbacks), pruner.config
    model = module()
    found = lp.compare(trainer, model, data(), clock=clock_of(model))
    assert [row.variant for row in found.rows] == ["dense", "pomt utility"]  # the paper's choice is this one
    assert trainer.callbacks == callbacks
    assert (pruner.config, pruner.enabled, pruner.decision) == (config, True, None)


def test_without_a_callback_the_defaults_are_compared(module: Any) -> None:
    trainer = L.Trainer(**OPTIONS)
    before = list(trainer.callbacks)
    model = module()
    lp.compare(trainer, model, data(), ["random"], [1.5], on_message=lambda _: None, clock=clock_of(model))
    assert trainer.callbacks == before


@pytest.mark.long
def test_methods_without_targets_are_planned_by_the_objective(module: Any, running: Any, tmp_path: Path) -> None:
    found = run(module, running, tmp_path, methods=["dense", "random", "topk"], objective=lp.LatencyBudget(speedup=1.5))
    assert [row.variant for row in found.rows] == ["dense", "random latency budget", "topk latency budget"]
    for row in found.rows[1:]:
        assert row.speedup >= 1.5 * 0.994
    assert found.best.met
    assert lp.Schedule.load(tmp_path / "schedule.yaml").total_removed in {row.removed for row in found.rows[1:]}


def test_a_budget_that_cannot_be_met_is_a_result(module: Any, running: Any, tmp_path: Path) -> None:
    found = run(module, running, tmp_path, methods=["random"], objective=lp.LatencyBudget(speedup=50))
    row = found.rows[1]
    assert row.variant == "random latency budget"
    assert found.plan.planned[1].plan["met"] is False
    assert not found.best.met
    assert found.best.reason.startswith("No variant meets the latency budget, 50x.")
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["best"]["met"] is False


def test_a_variant_that_removes_nothing_is_dense(module: Any, running: Any) -> None:
    class Counting(lp.ImageClassifier):
        runs = 0

        def on_validation_start(self) -> None:
            self.runs += self.trainer.limit_val_batches != 1

    model = module(Counting)
    found = run(model, running, objective=DenseOnly())
    dense, _, nothing = found.rows
    assert nothing.variant == "pomt dense only"
    assert (nothing.removed, nothing.tokens, nothing.block) == (0, 197, "")
    assert (nothing.latency_ms, nothing.latency_spread, nothing.speedup) == (dense.latency_ms, 0, 1.0)
    assert (nothing.top1, nothing.top1_change) == (dense.top1, 0)
    assert model.runs == 2


def test_a_variant_that_is_not_faster_in_the_run_of_all_removes_nothing(
    module: Any, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, final = ComparisonPlanner._time_all, []

    def time_all(self: ComparisonPlanner) -> Any:
        set_latency(monkeypatch, lambda _: 0.2, runs=False)
        return final.append(1) or real(self)

    monkeypatch.setattr(ComparisonPlanner, "_time_all", time_all)
    found = run(module, running)
    assert final
    assert [(row.removed, row.tokens, row.speedup) for row in found.rows] == [(0, 197, 1.0)] * len(found.rows)
    assert found.rows[1].note == "nothing is gained"
    assert "nothing is gained" in found.plan.planned[1].reason
    assert len({row.top1 for row in found.rows}) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("schedule", "block", "removed"),
    [(60, "2", 60), ([10, 0, 20, 0], "0 2", 30), (0.5, "2", 98)],
)
def test_a_given_schedule_is_the_only_variant(
    schedule: Any, block: str, removed: int, module: Any, running: Any, tmp_path: Path
) -> None:
    found = run(module, running, tmp_path, schedule=schedule, block=2)
    assert [row.variant for row in found.rows] == ["dense", "pomt given"]
    assert (found.rows[1].block, found.rows[1].removed, found.rows[1].tokens) == (block, removed, 197 - removed)
    assert found.plan.planned[1].plan is None
    assert isinstance(found.plan.planned[1].keep_rates, KeepRates) == (schedule == 0.5)
    assert found.best is None
    assert not (tmp_path / "schedule.yaml").exists()
    assert lp.Schedule.load(tmp_path / "schedules" / "pomt-given.yaml").total_removed == removed


MIXED = lp.Schedule([0, 40, 0, 30], (None, "topk", None, "tome"))


@pytest.mark.parametrize("schedule", [MIXED, KeepRates.of(MIXED, 197)], ids=["schedule", "keep rates"])
def test_a_given_schedule_that_names_a_method_for_each_block(
    schedule: Any, module: Any, running: Any, tmp_path: Path
) -> None:
    model = module()
    with lp.patch(model, schedule):
        (expected,) = L.Trainer(**OPTIONS, enable_model_summary=False).validate(model, data(), verbose=False)
    trainer, _ = running(schedule=schedule, method="auto")
    messages: list[str] = []
    shared: dict[str, Any] = {"output": tmp_path, "on_message": messages.append, "clock": clock_of(model)}
    found = lp.compare(trainer, model, data(), ["random"], [1.1], **shared)
    row = found.rows[-1]
    assert [each.variant for each in found.rows] == ["dense", "random 1.1x", "mixed given"]
    assert (row.method, row.block, row.removed, row.tokens) == ("mixed", "1 3", 70, 127)
    # A token that is removed in block 1 of 4 is missing in the blocks whose clock looks at what leaves them; the class
    # token alone leaves the last one.
    assert row.speedup == pytest.approx(4 * 197 / (3 * 197 - 2 * 40 + 1), rel=1e-6)
    assert (row.top1, row.top5) == (expected["val/top1"], expected["val/top5"])
    assert found.traces["mixed given"].tokens.tolist() == [127] * len(found.pictures)
    saved = lp.Schedule.load(tmp_path / "schedules" / "mixed-given.yaml")
    assert (saved.removed, saved.method) == (MIXED.removed, MIXED.method)
    messages.clear()
    again = lp.compare(trainer, model, data(), ["random"], [1.1], **shared)
    assert "3 of 3 variants were finished before" in messages[0]
    assert [each.to_dict() for each in again.rows] == [each.to_dict() for each in found.rows]


def test_a_given_schedule_of_several_methods_is_the_only_variant(module: Any, running: Any) -> None:
    found = run(module, running, schedule=MIXED, method="auto")
    assert [row.variant for row in found.rows] == ["dense", "mixed given"]
    assert found.plan.planned[1].settings == {}


def test_a_given_schedule_among_methods_at_targets(module: Any, running: Any, tmp_path: Path) -> None:
    trainer, _ = running(method="pomt", schedule=60)
    model = module()
    messages: list[str] = []
    shared: dict[str, Any] = {"output": tmp_path, "on_message": messages.append, "clock": clock_of(model)}
    found = lp.compare(trainer, model, data(), ["random", "int8"], [1.25], **shared)
    assert [row.variant for row in found.rows] == ["dense", "random 1.25x", "int8", "pomt given"]
    messages.clear()
    lp.compare(trainer, model, data(), ["random", "int8"], [1.25], **shared)
    assert "4 of 4 variants were finished before" in messages[0]
    other, _ = running(method="pomt", schedule=61)
    with pytest.raises(Anew, match=r"^A new comparison: methods differ "):
        lp.compare(other, model, data(), ["random", "int8"], [1.25], **{**shared, "on_message": stop_at_once})


def test_a_kept_latency_profile_is_named(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_latency(
        monkeypatch, lambda alternative: 1e-3 * (alternative if isinstance(alternative, int) else 197), runs=False
    )
    said = []
    for _ in range(2):
        messages: list[str] = []
        trainer, _ = running(calibration=8, objective=lp.LatencyBudget(speedup=1.2))
        options: dict[str, Any] = {"on_message": messages.append, "clock": TickingClock()}
        lp.compare(trainer, digits_module(), data(), ["random"], **options)
        said.append(sum(line.startswith("The latency profile was measured 20") for line in messages))
    assert said == [0, 1]


def test_objectives_are_resumed_and_told_apart(module: Any, running: Any, tmp_path: Path) -> None:
    messages: list[str] = []
    shared: dict[str, Any] = {"output": tmp_path, "on_message": messages.append}
    first = run(module, running, **shared, objective=lp.AccuracyBudget(0.1))
    assert "Validating dense (1 of 3)" in messages
    messages.clear()
    again = run(module, running, **shared, objective=lp.AccuracyBudget(0.1))
    assert [row.to_dict() for row in again.rows] == [row.to_dict() for row in first.rows]
    assert again.plan == first.plan
    assert "3 of 3 variants were finished before" in messages[0]
    for change in ({"objective": lp.AccuracyBudget(0.2)}, {"objective": lp.AccuracyBudget(0.1), "seed": 1}):
        with pytest.raises(Anew, match=r"^A new comparison: "):
            run(module, running, **{**shared, "on_message": stop_at_once}, **change)


@pytest.mark.parametrize(
    ("objective", "name"),
    [(lp.LatencyBudget(speedup=1.5), "latency budget"), (DenseOnly(), "dense only"), (lp.Utility(0.3), "utility")],
)
def test_variants_are_named_after_their_objectives(objective: Objective, name: str, running: Any) -> None:
    from lightning_prune.comparison.request_reading import read_requests

    _, pruner = running(method="tome")
    names = [request.name for request in read_requests(pruner.config, None, None, objective)]
    assert names == ["dense", "pomt utility", f"tome {name}"]
    _, pruner = running(method="pomt")
    requests = read_requests(pruner.config, None, None, lp.Utility(0.3))
    assert [request.name for request in requests] == ["dense", "pomt utility, alpha 0.5", "pomt utility, alpha 0.3"]
    assert {request.method for request in requests[1:]} == {"pomt"}


class Stop(Exception):
    pass


def test_an_error_leaves_trainer_callback_and_model_as_they_were(module: Any, running: Any) -> None:
    class Failing(lp.ImageClassifier):
        runs = 0

        def on_validation_end(self) -> None:
            self.runs += 1
            if self.runs == 3:  # the first batch, dense, and this one
                raise Stop

    model = module(Failing)
    trainer, pruner = running(calibration=8, method="pomt")
    callbacks, config = list(trainer.callbacks), pruner.config
    with pytest.raises(Stop):
        lp.compare(trainer, model, data(), clock=clock_of(model))
    assert model.runs == 3
    assert trainer.callbacks == callbacks
    assert (pruner.config, pruner.enabled, pruner.decision) == (config, True, None)
    assert isinstance(pruner, TokenPruning)
    assert type(model.model.blocks[1]).__name__ == "Block"


class Plain(L.LightningModule):
    """Logs nothing of what the table has columns for."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def test_a_module_that_logs_nothing_has_empty_columns(module: Any, running: Any) -> None:
    found = run(Plain(module().model), running, schedule=60)
    for row in found.rows:
        assert (row.top1, row.top5, row.throughput, row.throughput_end_to_end) == (None, None, None, None)
        assert row.images == 16
    assert found.rows[1].agreement is not None  # the transformer itself returns logits, and the batches hold labels
    assert found.rows[1].top1_low < found.rows[1].top1_change < found.rows[1].top1_high


class Scored(Plain):
    """Logs metrics of its own, a loss first."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("val/loss", torch.nn.functional.cross_entropy(logits, batch[1]))
        self.log("val/seconds", 1.0)
        self.log("val/accuracy", (logits.argmax(1) == batch[1]).float().mean())


def test_the_metric_of_the_module_stands_in_where_it_logs_no_top1(module: Any, running: Any, tmp_path: Path) -> None:
    model = module().model
    found = run(Scored(model), running, tmp_path, schedule=60)
    dense, pruned = found.rows
    assert {row.metric_name for row in found.rows} == {"val/accuracy"}
    (unpruned,) = L.Trainer(**OPTIONS).validate(Scored(model), data(), verbose=False)
    assert (dense.metric, dense.metric_change) == (unpruned["val/accuracy"], None)
    with lp.patch(model, "pomt", found.plan.planned[1].schedule):
        (expected,) = L.Trainer(**OPTIONS).validate(Scored(model), data(), verbose=False)
    assert pruned.metric == expected["val/accuracy"]
    assert pruned.metric_change == pruned.metric - dense.metric
    for row in found.rows:
        assert (row.top1, row.top1_change, row.top1_low, row.top1_high) == (None, None, None, None)
        assert row.speedup_vs_eager == row.speedup
    assert pruned.agreement is not None
    assert "val/accuracy" in (tmp_path / "report.html").read_text()
    header = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert header.startswith("variant,method,top1,top1_change,speedup,latency_ms,latency_p90_ms,runtime,precision,")


def test_loaders_serve_as_data(module: Any, running: Any) -> None:
    digits = data()
    digits.setup("validate")
    trainer, _ = running(method="pomt")
    model = module()
    found = lp.compare(trainer, model, digits.val_dataloader(), ["random"], [1.5], clock=clock_of(model))
    assert [row.images for row in found.rows] == [16, 16]
    assert found.plan.seconds > 0
