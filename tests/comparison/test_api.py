"""Methods at target speed-ups, from the arguments to the last row: real validations, latencies set by the test."""

import copy
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_prune as lp
from helpers.clock import TickingClock
from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.comparison import setup
from lightning_prune.comparison.comparison_planning import ComparisonPlanner
from lightning_prune.comparison.paired_statistics import paired_interval
from lightning_prune.profiling.energy_meter import EnergyReading
from lightning_prune.reduction import POMT
from lightning_prune.reduction.visual_words import VWTInter
from lightning_prune.reduction.word_learning import learn_vocabulary

pytestmark = pytest.mark.usefixtures("clockwork")


def data() -> lp.DigitsData:
    return lp.DigitsData(batch_size=8)


def run(module: Any, running: Any, output: Path | None, methods: Any, speedups: Any = None, **more: Any) -> Any:
    arguments = {name: more.pop(name) for name in ("resume", "objective", "runtimes") if name in more}
    messages = more.pop("messages", [])
    trainer, _ = running(**more)
    model = module if isinstance(module, L.LightningModule) else module()
    options = {"output": output, "on_message": messages.append, "clock": TickingClock(), **arguments}
    return lp.compare(trainer, model, data(), methods, speedups, **options)


def test_rows_reach_their_targets_and_are_what_validation_says(module: Any, running: Any, tmp_path: Path) -> None:
    model = module()
    before = copy.deepcopy(model.state_dict())
    found = run(model, running, tmp_path, ["pomt", "random", "int8", "pomt+int8"], [1.25, 1.5, 6.0])
    assert [row.variant for row in found.rows] == [
        *("dense", "pomt 1.25x", "pomt 1.5x", "random 1.25x", "random 1.5x", "int8"),
        *("pomt+int8 1.25x", "pomt+int8 1.5x"),
    ]
    dense, pomt = found.rows[:2]
    assert (dense.method, dense.block, dense.removed, dense.tokens, dense.speedup) == ("", "", 0, 197, 1.0)
    # A token removed in block 1 of 4 saves 3 of 4 * 197: R is the smallest that reaches the target, or misses by 0.5%.
    for row in found.rows:
        ratio = row.target_speedup * (1.2 if row.int8 else 1.0) if row.target_speedup else 1.0
        low, high = (math.ceil(788 / 3 * (1 - tolerance / ratio)) for tolerance in (1.005, 1.0))
        assert low <= row.removed <= high
    assert [row.int8 for row in found.rows] == [False] * 5 + [True] * 3
    assert found.rows[5].note == f"8 bits by torchao {version('torchao')}"
    assert [row.target_speedup for row in found.rows] == [None, 1.25, 1.5, 1.25, 1.5, None, 1.25, 1.5]
    assert [row.method for row in found.rows] == ["", "pomt", "pomt", "random", "random", "int8", "pomt", "pomt"]
    for row in found.rows:
        assert (row.images, row.batch_size, row.precision, row.latency_spread) == (16, 8, "float32", 0)
        if row.target_speedup is not None:
            assert row.target_speedup * 0.992 <= row.speedup < row.target_speedup * 1.03
            assert (row.tokens, row.block) == (197 - row.removed, "1")
        assert row.throughput > 0
    assert [(each.method, each.target_speedup) for each in found.plan.unreached] == [
        *(("pomt", 6.0), ("random", 6.0), ("pomt+int8", 6.0))
    ]
    assert found.plan.unreached[0].best == pytest.approx(788 / (788 - 3 * 194), rel=1e-3)
    (unpruned,) = L.Trainer(**_options()).validate(model, data(), verbose=False)
    assert (dense.top1, dense.top5) == (unpruned["val/top1"], unpruned["val/top5"])
    with lp.patch(model, "pomt", lp.Schedule.single(4, 1, pomt.removed)):
        (pruned,) = L.Trainer(**_options()).validate(model, data(), verbose=False)
    assert (pomt.top1, pomt.top5) == (pruned["val/top1"], pruned["val/top5"])
    assert pomt.top1_change == pytest.approx(pomt.top1 - dense.top1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.model.blocks[1]).__name__ == "Block"


def test_exact_is_one_row_with_the_predictions_of_dense(module: Any, running: Any, tmp_path: Path) -> None:
    found = run(module, running, tmp_path, ["exact", "exact+int8"], [1.5])
    dense, exact, both = found.rows
    assert (exact.variant, exact.method, exact.int8, exact.removed, exact.tokens) == ("exact", "exact", False, 0, 197)
    assert (both.variant, both.method, both.int8) == ("exact+int8", "exact", True)
    assert (exact.agreement, exact.top1, exact.images) == (1, dense.top1, 16)
    assert exact.speedup == pytest.approx(1.97)
    assert exact.gmacs < 0.95 * dense.gmacs
    assert not found.plan.unreached
    pooled = run(module(shape={"global_pool": "avg"}), running, tmp_path, ["exact", "random"], [1.5]).rows[1]
    assert pooled.speedup is None
    assert "no exact tail" in pooled.note


def _options() -> dict[str, Any]:
    from .conftest import OPTIONS

    return OPTIONS


def test_statistics_are_of_pairs_that_a_plain_loop_finds(module: Any, running: Any, tmp_path: Path) -> None:
    model = module()
    dense, row = run(model, running, tmp_path, ["random"], [2.0]).rows
    right: dict[str, list[bool]] = {"dense": [], "random": []}
    classes: dict[str, list[int]] = {"dense": [], "random": []}
    datamodule = data()
    datamodule.setup("validate")
    schedule = lp.Schedule.single(4, 1, row.removed)
    for number, (images, labels) in enumerate(datamodule.val_dataloader()):
        if number == 2:
            break
        for name in right:
            with torch.no_grad():
                if name == "dense":
                    best = model.model(images).argmax(1)
                else:
                    with lp.patch(model.model, "random", schedule):
                        best = model.model(images).argmax(1)
            classes[name] += best.tolist()
            right[name] += (best == labels).tolist()
    pairs = list(zip(right["dense"], right["random"], strict=True))
    expected = paired_interval(pairs.count((False, True)), pairs.count((True, False)), 16)
    assert (row.top1_change, row.top1_low, row.top1_high) == expected
    same = sum(a == b for a, b in zip(classes["dense"], classes["random"], strict=True)) / 16
    assert row.agreement == same
    assert (dense.agreement, dense.top1_low) == (None, None)


class Stop(Exception):
    pass


class Counting(lp.ImageClassifier):
    """Counts validations of more than one batch, and fails in the middle of the n-th."""

    runs, fail_in = 0, 0

    def on_validation_start(self) -> None:
        self.long = self.trainer.limit_val_batches != 1
        self.runs += self.long

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.long and self.runs == self.fail_in and batch_idx == 1:
            raise Stop
        super().validation_step(batch, batch_idx, dataloader_idx)


@pytest.mark.long
def test_an_interruption_loses_no_finished_row(module: Any, running: Any, tmp_path: Path) -> None:
    methods, speedups = ["pomt", "random", "int8"], [1.5]
    whole = run(module, running, tmp_path / "whole", methods, speedups)
    model = module(Counting)
    model.fail_in = 3
    messages: list[str] = []
    with pytest.raises(Stop):
        run(model, running, tmp_path / "cut", methods, speedups, messages=messages)
    assert model.runs == 3
    assert type(model.model.blocks[1]).__name__ == "Block"
    names = ["dense", "pomt 1.5x", "random 1.5x"]
    assert messages == [f"Validating {name} ({n} of 4)" for n, name in enumerate(names, 1)]

    model.fail_in, model.runs, messages[:] = 0, 0, []
    again = run(model, running, tmp_path / "cut", methods, speedups, messages=messages)
    assert model.runs == 2  # random, which was cut short, and int8
    assert "2 of 4 variants were finished before" in messages[0]
    assert messages[1:] == ["Validating random 1.5x (3 of 4)", "Validating int8 (4 of 4)"]
    timeless = ("throughput", "throughput_end_to_end")
    for one, other in zip(whole.rows, again.rows, strict=True):
        same = {key: value for key, value in one.to_dict().items() if key not in timeless}
        assert same == {key: value for key, value in other.to_dict().items() if key not in timeless}
    assert again.plan.to_dict() == again.plan.from_dict(again.plan.to_dict()).to_dict()

    model.runs, messages[:] = 0, []
    third = run(model, running, tmp_path / "cut", methods, speedups, messages=messages)
    assert model.runs == 0
    assert [row.to_dict() for row in third.rows] == [row.to_dict() for row in again.rows]
    run(model, running, tmp_path / "cut", methods, speedups, resume=False)
    assert model.runs == 4


@pytest.mark.long
def test_another_question_begins_anew_and_loses_nothing(
    module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, messages = module(Counting), []
    run(model, running, tmp_path, ["random"], [1.5])
    asked = []
    real = ComparisonPlanner.plan
    monkeypatch.setattr(ComparisonPlanner, "plan", lambda self: asked.append(1) or real(self))
    run(model, running, tmp_path, ["random"], [1.5])
    assert (asked, model.runs) == ([], 2)
    run(model, running, tmp_path, ["random"], [2.0], messages=messages)
    assert (asked, model.runs) == ([1], 4)
    assert messages[0].startswith("A new comparison: speedups differ ")
    assert str(tmp_path / "state") in messages[0]
    bias = model.model.head.bias.detach().clone()
    with torch.no_grad():
        model.model.head.bias += 1
    messages.clear()
    run(model, running, tmp_path, ["random"], [1.5], messages=messages)
    assert messages[0].startswith("A new comparison: weights differ ")
    run(model, running, tmp_path, ["random"], [1.5], block=2)
    run(model, running, tmp_path, ["random"], [1.5], limit_val_batches=3)
    assert (len(asked), model.runs) == (4, 10)
    with torch.no_grad():
        model.model.head.bias.copy_(bias)
    model.runs = 0
    run(model, running, tmp_path, ["random"], [2.0])
    assert (len(asked), model.runs) == (4, 0)  # the weights are the same again


def test_another_attention_implementation_is_measured_again(module: Any, running: Any, tmp_path: Path) -> None:
    model, messages = module(Counting), []
    fused = model.model.blocks[0].attn.fused_attn
    run(model, running, tmp_path, ["random"], [1.5])
    for block in model.model.blocks:
        block.attn.fused_attn = not fused
    found = run(model, running, tmp_path, ["random"], [1.5], messages=messages)
    assert messages[0].startswith("A new comparison: structure differs from ")
    assert model.runs == 4
    assert found.rows[0].images == 16


@pytest.mark.long
@pytest.mark.parametrize("place", ["model.blocks.1", ""])
def test_where_a_condition_is_unknown_nothing_is_resumed_and_that_is_said(
    place: str, module: Any, running: Any, tmp_path: Path
) -> None:
    model = module(Counting)
    messages: list[str] = []
    hook = model.get_submodule(place).register_forward_hook(lambda *_: None)
    for runs in (2, 4):
        run(model, running, tmp_path, ["random"], [1.5], messages=messages)
        assert model.runs == runs
        assert not (tmp_path / "state").exists()
    assert len([line for line in messages if line.startswith("Nothing is resumed") and "hooks" in line]) == 2
    assert not any("Resuming" in line for line in messages)
    hook.remove()
    run(model, running, tmp_path, ["random"], [1.5])
    assert model.runs == 6
    run(model, running, tmp_path, ["random"], [1.5])
    assert model.runs == 6


@pytest.mark.long
def test_targets_of_one_schedule_are_validated_once(module: Any, running: Any, tmp_path: Path) -> None:
    model = module(Counting)
    found = run(model, running, tmp_path, ["random"], [1.5, 1.5004])
    assert model.runs == 2
    one, other = found.rows[1:]
    assert (one.removed, one.top1, one.throughput) == (other.removed, other.top1, other.throughput)
    assert (one.target_speedup, other.target_speedup) == (1.5, 1.5004)


class Foreign(POMT):
    """Cannot be used with any model."""

    name = "foreign"

    def reduce(self, sequence: Any, remove: int) -> Any:
        raise lp.UnsupportedModelError("it is from elsewhere")


def test_methods_that_cannot_be_used_are_rows_with_a_note(module: Any, running: Any, tmp_path: Path) -> None:
    found = run(module, running, tmp_path, ["foreign", "random"], [1.5], method=Foreign())
    foreign = found.rows[1]
    assert (foreign.variant, foreign.method, foreign.note) == ("foreign", "foreign", "it is from elsewhere")
    assert (foreign.latency_ms, foreign.top1, foreign.tokens, foreign.removed) == (None, None, None, None)
    assert [row.variant for row in found.rows] == ["dense", "foreign", "random 1.5x"]
    with pytest.raises(lp.UnsupportedModelError, match=r"None of the methods can be .*foreign: it is from elsewhere"):
        run(module, running, tmp_path / "alone", ["foreign"], [1.5], method=Foreign())
    assert not (tmp_path / "alone").exists()


def test_a_method_of_which_the_images_decide_has_one_row(module: Any, running: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary = learn_vocabulary([torch.rand(8, 1, 56, 56)], 4, words=5, progress=False)
    reduction = VWTInter(vocabulary, threshold=0.5)
    found = run(module, running, tmp_path, ["vwt-inter", "random"], [1.5], method=reduction)
    row = found.rows[1]
    assert (row.variant, row.method, row.target_speedup, row.removed, row.tokens) == (
        "vwt-inter",
        "vwt-inter",
        None,
        None,
        None,
    )
    assert row.note == "the images decide how many tokens go"
    assert row.speedup == pytest.approx(197 / 100)
    assert (row.images, row.top1_low < row.top1_change < row.top1_high) == (16, True)
    assert list(found.traces) == ["vwt-inter", "random 1.5x"]
    assert found.plan.planned[1].schedule is None
    again = run(module, running, tmp_path, ["vwt-inter", "random"], [1.5], method=VWTInter(vocabulary, threshold=0.5))
    assert again.rows[1].throughput == row.throughput


def test_int8_without_torchao_says_so_in_the_row_until_it_is_installed(
    module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, methods = module(), ["int8", "random", "random+int8"]
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "torchao.quantization", None)
        missing.setattr(setup, "quantizer_version", lambda: "none")
        found = run(model, running, tmp_path, methods, [1.5])
    notes = {row.variant: row.note for row in found.rows if row.int8}
    assert list(notes) == ["int8", "random+int8"]
    assert all("pip install 'lightning-prune[int8]'" in note for note in notes.values())
    messages: list[str] = []
    found = run(model, running, tmp_path, methods, [1.5], messages=messages)
    assert any(line.startswith("A new comparison: int8 differs") for line in messages)
    assert [row.variant for row in found.rows if row.int8] == ["int8", "random+int8 1.5x"]


def test_energy_where_there_is_a_counter(
    module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Meter:
        name = "meter"

    def measure(run: Any, images: int, *_: Any) -> EnergyReading:
        run()
        return EnergyReading(2.0 / images, 0.0, 40.0, 10.0, 1.0, images, 1, "meter")

    monkeypatch.setattr("lightning_prune.comparison.variant_costs.find_counter", lambda _: Meter())
    monkeypatch.setattr("lightning_prune.comparison.variant_costs.measure_energy", measure)
    found = run(module, running, tmp_path, ["random", "int8"], [1.5])
    assert [(row.joules_per_image, row.watts) for row in found.rows] == [(0.25, 40.0)] * 3
    dense, pruned, in_8_bits = found.rows
    assert 0 < pruned.gmacs < dense.gmacs
    assert 0 < pruned.peak_memory_mib <= 1.1 * dense.peak_memory_mib
    assert (in_8_bits.gmacs, in_8_bits.peak_memory_mib) == (None, None)
    assert found.plan.energy == "meter; the idle device draws 10.0 W"


@pytest.mark.long
def test_pictures_are_of_one_target_that_all_reach(module: Any, running: Any, tmp_path: Path) -> None:
    found = run(module, running, tmp_path, ["pomt", "random", "pomt+int8", "int8"], [1.25, 1.5, 3.0])
    assert list(found.traces) == ["pomt 3x", "random 3x"]
    assert found.pictures.shape == (4, 1, 56, 56)
    removed = {row.variant: row.removed for row in found.rows}
    for name, trace in found.traces.items():
        assert trace.grid == (14, 14)
        assert set(trace.tokens.tolist()) == {197 - removed[name]}


def test_pictures_are_from_all_over_the_dataset_at_any_batch_size(
    module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "data", lambda: lp.DigitsData(batch_size=1))
    found = run(module, running, tmp_path, ["pomt"], [1.25])
    assert found.pictures.shape == (4, 1, 56, 56)
    assert len({picture.sum().item() for picture in found.pictures}) == 4
    validated = data()
    validated.setup("validate")
    first = torch.cat([images for images, _ in list(validated.val_dataloader())[:4]])
    assert not torch.equal(found.pictures, first)


def test_where_the_dataset_cannot_be_sampled_the_first_batch_is_pictured(
    module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise lp.DataError("The calibration images are of several sizes.")

    monkeypatch.setattr(FirstBatch, "sample", refused)
    found = run(module, running, tmp_path, ["pomt"], [1.25])
    validated = data()
    validated.setup("validate")
    assert torch.equal(found.pictures, next(iter(validated.val_dataloader()))[0][:4])


def test_the_papers_protocol_has_no_targets(module: Any, running: Any, tmp_path: Path) -> None:
    with pytest.raises(lp.ArgumentError, match=r"`protocol` must be 'deployed' with `speedups`, got 'paper'"):
        run(module, running, tmp_path, ["pomt"], [1.5], method="pomt", protocol="paper")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runtimes": []}, r"`runtimes` must be a list of at least one runtime, got \[\]"),
        ({"runtimes": "torch"}, "`runtimes` must be a list of at least one runtime, got 'torch'"),
        ({"runtimes": ["torch", "torch"]}, r"`runtimes` must be different from one another, got \['torch', 'torch'\]"),
        ({"runtimes": ["tortch"]}, "`runtime` must be .*got 'tortch'"),
        ({"objective": "fast"}, "`objective` must be an Objective .*got 'fast'"),
        ({"speedups": [0.5]}, "`speedups` must be .* > 1 .*got 0.5"),
        ({"methods": ["pomt+int8"]}, "`speedups` must be given for pomt.int8, .*got None"),
    ],
)
def test_unusable_arguments(arguments: dict[str, Any], message: str, module: Any, running: Any, tmp_path: Path) -> None:
    arguments = {"methods": ["pomt"], **arguments}
    with pytest.raises(lp.ArgumentError, match=message):
        run(module, running, tmp_path, arguments.pop("methods"), **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 0.0])
def test_nothing_to_validate_is_an_error_and_leaves_the_trainer_alone(
    limit: int | float, module: Any, running: Any, tmp_path: Path
) -> None:
    trainer, pruner = running(limit_val_batches=limit)
    callbacks = list(trainer.callbacks)
    with pytest.raises(lp.DataError, match=r"^The validation loader yielded no batch to compare on"):
        lp.compare(trainer, module(), data(), ["random"], output=tmp_path)
    assert (trainer.callbacks, trainer.limit_val_batches, pruner.enabled) == (callbacks, 0, True)


def test_the_trainer_is_as_before_after_an_error(module: Any, running: Any, tmp_path: Path) -> None:
    model = module(Counting)
    model.fail_in = 2
    trainer, pruner = running()
    callbacks = list(trainer.callbacks)
    with pytest.raises(Stop):
        lp.compare(trainer, model, data(), ["random"], [1.5], output=tmp_path)
    assert (trainer.callbacks, trainer.limit_val_batches, pruner.enabled) == (callbacks, 2, True)
    assert isinstance(pruner, TokenPruning)
