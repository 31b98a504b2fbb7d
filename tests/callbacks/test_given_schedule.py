"""Schedules that the user gives, in every form, and where they were made."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from helpers.data import loader, noise_images
from helpers.models import DEPTH, TOKENS
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.callbacks import PruningConfig, TokenPruning

from .tiny import Snapshot, Tiny, pruner, trainer, validated

pytestmark = pytest.mark.usefixtures("clockwork")
SINGLE = lp.Schedule.single(DEPTH, 1, 5)


@pytest.mark.parametrize(
    ("schedule", "block", "expected"),
    [
        (5, 0.25, SINGLE),
        (5, 3, lp.Schedule([0, 0, 0, 5])),
        (5, 0.5, lp.Schedule([0, 0, 5, 0])),
        ([2, 2, 1, 0], 0.25, lp.Schedule([2, 2, 1, 0])),
        ((2, 2, 1, 0), 0.25, lp.Schedule([2, 2, 1, 0])),
        (lp.Schedule([0, 1, 0, 1]), 0.25, lp.Schedule([0, 1, 0, 1])),
        (0, 0.25, lp.Schedule([0, 0, 0, 0])),
    ],
)
def test_given_schedules_are_deployed_and_timed(
    schedule: Any, block: int | float, expected: lp.Schedule, decisions: list[str]
) -> None:
    callback = pruner(schedule=schedule, block=block)
    module, running = validated(callback)
    assert decisions == ["given"]
    decision = callback.decision
    assert decision.schedule == expected.with_method("pomt")
    assert decision.tokens == TOKENS - expected.total_removed
    assert module.tokens() == {expected.tokens(TOKENS)[-2]}, "tokens that enter the last block"
    assert (decision.plan, decision.predicted_ms, decision.calibration) == (None, None, "")
    assert decision.reason == "The schedule was given."
    assert decision.speedup == pytest.approx(17 / 12 if expected.total_removed else 1.0)
    assert running.callback_metrics["pruning/removed"] == expected.total_removed


def test_a_schedule_of_another_method_is_refused(tmp_path: Path) -> None:
    path = lp.Schedule.single(DEPTH, 1, 5, "random").save(tmp_path / "schedule.yaml")
    with pytest.raises(lp.ArgumentError, match=r"`method` .* random, got pomt"):
        pruner(method="pomt", schedule=path)


@pytest.mark.parametrize("name", ["schedule.yaml", "schedule.json"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_saved_schedule_is_deployed(name: str, kind: Any, tmp_path: Path) -> None:
    path = kind(SINGLE.save(tmp_path / name))
    module, _ = validated(pruner(schedule=path))
    assert module.tokens() == {TOKENS - 5}


def test_the_schedule_of_a_run_is_deployed_by_the_next_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    planned = pruner()
    first, _ = validated(planned)
    path = planned.decision.schedule.save(tmp_path / "schedule.yaml")
    second, _ = validated(pruner(schedule=path))
    assert second.tokens() == first.tokens()
    assert not [warning for warning in recwarn if "made elsewhere" in str(warning.message)]


def test_a_schedule_from_elsewhere_is_deployed_with_a_warning_that_names_the_differences(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    made_on = MeasurementSource(device="Abacus", batch_size=64, precision="bf16-mixed", dense_tokens=TOKENS + 1)
    path = lp.Schedule.single(DEPTH, 1, 5, made_on=made_on).save(tmp_path / "schedule.yaml")
    callback = pruner(schedule=path)
    module, _ = validated(callback)
    assert module.tokens() == {TOKENS - 5}
    told = [str(warning.message) for warning in recwarn if "made elsewhere" in str(warning.message)]
    assert len(told) == 4
    assert told[0].startswith("The schedule was made elsewhere: device Abacus there, ")
    assert told[1] == "The schedule was made elsewhere: batch_size 64 there, 4 here."
    assert told[2] == "The schedule was made elsewhere: precision bf16-mixed there, float32 here."
    assert told[3] == f"The schedule was made elsewhere: dense_tokens {TOKENS + 1} there, {TOKENS} here."


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([0, 5, 0], "`schedule` must have 4 blocks, as the model, got 3"),
        (lp.Schedule.single(12, 3, 5), "`schedule` must have 4 blocks, as the model, got 12"),
        (17, "at most 14 of the 17 tokens that enter block 1 with pomt, got 17"),
        ([8, 8, 0, 0], "at most 6 of the 9 tokens that enter block 1 with pomt, got 8"),
        ([0, -1, 0, 0], ">= 0, got -1"),
    ],
)
def test_a_schedule_that_does_not_fit_the_model_is_refused(schedule: Any, message: str) -> None:
    module = Tiny()
    before = Snapshot(module)
    with pytest.raises(lp.ScheduleError, match=message):
        trainer(pruner(schedule=schedule)).validate(module, loader(), verbose=False)
    assert module.steps == []
    before.assert_unchanged()


def test_files_without_a_schedule_are_refused_when_the_callback_is_made(tmp_path: Path) -> None:
    missing, cut, foreign = (tmp_path / f"{name}.yaml" for name in ("missing", "cut", "foreign"))
    text = SINGLE.save(cut).read_text()
    cut.write_text(text[: text.index("removed") + 11])
    foreign.write_text("learning_rate: 0.1\n")
    for path, message in (
        (missing, "^Cannot read .*missing.yaml: No such file or directory"),
        (cut, "cut.yaml is damaged or not a lightning_prune.schedule or lightning_prune.keep_rates file"),
        (
            foreign,
            "foreign.yaml is not a lightning_prune.schedule or lightning_prune.keep_rates file: it has no format entry",
        ),
    ):
        with pytest.raises(lp.FileFormatError, match=message):
            pruner(schedule=path)


def test_lists_that_are_no_schedule_are_refused_when_the_callback_is_made() -> None:
    with pytest.raises(lp.ScheduleError, match=">= 0, got -2 for block 1"):
        pruner(schedule=[1, -2, 0, 0])
    with pytest.raises(lp.ScheduleError, match="got an empty list"):
        pruner(schedule=[])
    assert pruner(schedule="auto").config.schedule == "auto"


def test_the_default_plans_all_methods_within_half_a_percent_of_accuracy() -> None:
    config = lp.TokenPruning().config
    assert (config.label, config.plans_blocks, config.effective_objective) == ("auto", True, lp.AccuracyBudget(0.005))
    assert len(config.methods) > 1
    paper = lp.TokenPruning(method="pomt", objective=lp.Utility(0.5)).config
    assert (paper.label, paper.plans_blocks, paper.reducing_block, paper.effective_objective) == (
        "pomt",
        False,
        0.25,
        lp.Utility(0.5),
    )


@pytest.mark.parametrize("schedule", [8, 0.5, [2, 2, 2, 2], lp.Schedule([2, 2, 2, 2])])
def test_a_schedule_without_a_method_is_run_with_tome(schedule: Any) -> None:
    callback = pruner(method="auto", schedule=schedule)
    validated(callback)
    assert callback.decision.method == "tome"
    assert callback.decision.schedule.removed == (2, 2, 2, 2)


def test_a_schedule_that_names_its_method_is_run_with_it(tmp_path: Path) -> None:
    path = lp.Schedule.single(DEPTH, 1, 5, "topk").save(tmp_path / "schedule.yaml")
    callback = pruner(method="auto", schedule=path)
    validated(callback)
    assert callback.decision.schedule == lp.Schedule.single(DEPTH, 1, 5, "topk")


MIXED = [
    lp.Schedule([4, 0, 5, 0], ["tome", None, "topk", None]),
    lp.KeepRates([1, 0.7, 0.5, 1], [None, "topk", "evit", None]),
]


@pytest.mark.parametrize("schedule", MIXED, ids=["counts", "keep rates"])
@pytest.mark.parametrize("is_saved", [False, True])
def test_a_schedule_of_several_methods_runs_as_lp_patch_does(
    schedule: Any, is_saved: bool, tmp_path: Path, decisions: list[str]
) -> None:
    callback, module = (
        pruner(method="auto", schedule=schedule.save(tmp_path / "s.yaml") if is_saved else schedule),
        Tiny(),
    )
    before = Snapshot(module)
    predicted = trainer(callback).predict(module, loader(8))
    before.assert_unchanged()
    assert decisions == ["given"]
    reference = Tiny().eval()
    counts = schedule if isinstance(schedule, lp.Schedule) else schedule.schedule(TOKENS)
    with torch.no_grad(), lp.patch(reference, schedule):
        assert all(
            torch.equal(a, reference(b)) for a, b in zip(predicted, noise_images(8, seed=1).split(4), strict=True)
        )
    decision = callback.decision
    assert decision.tokens == TOKENS - counts.total_removed
    assert module.tokens("predict") == {counts.tokens(TOKENS)[-2]}, "tokens that enter the last block"
    assert (decision.method, decision.reduction, decision.plan) == ("mixed", None, None)
    assert decision.schedule == counts
    assert decision.speedup == pytest.approx(17 / 12)


@pytest.mark.parametrize("schedule", MIXED, ids=["counts", "keep rates"])
def test_method_and_block_with_a_schedule_of_several_methods_are_refused(schedule: Any) -> None:
    with pytest.raises(lp.ArgumentError, match=r"`method` .*topk.* got pomt"):
        pruner(method="pomt", schedule=schedule)
    with pytest.raises(lp.ArgumentError, match=r"`block` .* got 'auto'"):
        pruner(method="auto", block="auto", schedule=schedule)


def test_a_config_with_several_methods_has_no_method_of_its_own() -> None:
    config = PruningConfig(schedule=MIXED[0])
    assert (config.label, config.is_mixed, config.is_planned, config.uses_token_curve) == ("mixed", True, False, True)
    with pytest.raises(lp.ArgumentError, match=r"`schedule` .* got Schedule\(depth=4"):
        _ = config.reduction
    one = PruningConfig(schedule=lp.Schedule([1, 0, 1, 0], ["topk", None, "topk", None]))
    assert (one.label, one.is_mixed, one.reduction.name) == ("topk", False, "topk")


def test_a_schedule_that_names_an_unknown_method_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(lp.ArgumentError, match=r"`method` .* got 'pompt'"):
        pruner(method="auto", schedule=lp.Schedule([1, 0, 1, 0], ["tome", None, "pompt", None]))


def test_the_decision_of_another_callback_is_used_with_its_own_method(decisions: list[str]) -> None:
    """Whatever the method of the callback that takes it over."""
    for schedule in (MIXED[0], lp.Schedule([0, 3, 0, 0], "topk")):
        first = pruner(method="auto", schedule=schedule)
        validated(first)
        second = TokenPruning(verbose=False)
        second.use(first.decision)
        module, _ = validated(second)
        assert module.tokens() == {first.decision.tokens}
    assert decisions == ["given", "given"]


def test_callback_and_config_have_the_same_arguments_and_defaults() -> None:
    """Names and defaults are written twice, so that editors show them."""
    own = {name: p.default for name, p in inspect.signature(lp.TokenPruning).parameters.items() if name != "enabled"}
    assert own == {field.name: field.default for field in dataclasses.fields(PruningConfig)}


def test_the_time_limit_covers_profiling_and_planning_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.callbacks import planned_schedule

    limits: dict[str, float] = {}
    for name in ("get_or_profile", "plan_many"):
        real = getattr(planned_schedule, name)

        def timed(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            limits[_name] = kwargs["time_limit"]
            return _real(*args, **kwargs)

        monkeypatch.setattr(planned_schedule, name, timed)
    callback = pruner(time_limit=2.0)
    validated(callback)
    assert limits["get_or_profile"] == pytest.approx(0.6)
    assert 0 < limits["plan_many"] < 2.0


@pytest.mark.parametrize(("schedule", "removed"), [(0.7, 4), (0.6, 7), ([7, 0, 0, 0], 7)])
def test_scaled_images(schedule: Any, removed: int, recwarn: pytest.WarningsRecorder) -> None:
    """Of 4 x 4 patches, 0.6 allows 10 at most, which is 3 x 3; also in a step that calls parts of the model."""

    class Parts(Tiny):
        def forward(self, images: Any) -> Any:
            return self.vit.forward_head(self.vit.forward_features(images))

    for kind in (Tiny, Parts):
        callback, module = pruner(method="resize", schedule=schedule), kind()
        before = Snapshot(module)
        validated(callback, module)
        assert list(callback.decision.schedule.removed) == [removed, 0, 0, 0]
        assert module.tokens() == {TOKENS - removed} == {callback.decision.tokens}
        before.assert_unchanged()
    assert not [warning for warning in recwarn if "The blocks of the Vision Transformer" in str(warning.message)]


def test_scaled_images_and_another_method() -> None:
    mixed = lp.KeepRates([0.8, 1, 0.5, 1], ["resize", None, "topk", None])
    callback = pruner(method="auto", schedule=mixed)
    module, _ = validated(callback)
    assert callback.decision.schedule.removed == (4, 0, 6, 0)
    assert module.tokens() == {7}
