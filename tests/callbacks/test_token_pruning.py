"""The callback in Trainer's loops: what is pruned, what is not, and that nothing of it stays."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import lightning_prune as lp
from helpers.data import loader, noise_images
from helpers.models import TOKENS, tiny_vit
from lightning_prune.callbacks import TokenPruning, decider
from lightning_prune.runtimes import parse_runtime

from .tiny import Snapshot, Stream, Tiny, pruner, stop_counting, trainer, validated

METRICS = {f"pruning/{name}" for name in ("latency_ms", "dense_latency_ms", "speedup", "tokens", "removed")}

pytestmark = pytest.mark.usefixtures("clockwork")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_run_is_pruned_from_its_first_batch_and_loses_none(stage: str) -> None:
    module, callback = Tiny(), pruner()
    before = Snapshot(module)
    getattr(trainer(callback), stage)(module, loader(22))
    name = {"validate": "val"}.get(stage, stage)
    assert [step.images for step in module.steps] == [4, 4, 4, 4, 4, 2]
    assert callback.decision is not None
    assert callback.decision.schedule.total_removed > 0
    assert module.tokens(name) == {callback.decision.tokens} == {TOKENS - callback.decision.schedule.total_removed}
    before.assert_unchanged()


def test_fit_prunes_validation_only_and_decides_once(decisions: list[str], tmp_path: Path) -> None:
    module, callback = Tiny(), pruner()
    saved = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    running = trainer(
        callback, saved, max_epochs=3, num_sanity_val_steps=2, enable_checkpointing=True, val_check_interval=0.5
    )
    running.fit(module, loader(16), loader(12))
    assert decisions == ["plan"]
    assert module.tokens("sanity") == module.tokens("train") == {TOKENS}
    assert module.tokens("val") == {callback.decision.tokens} != {TOKENS}
    assert (module.seen("train"), module.seen("val"), module.seen("sanity")) == (3 * 16, 6 * 12, 8)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert checkpoints
    for path in checkpoints:
        weights = torch.load(path, weights_only=True)["state_dict"]
        fresh = Tiny()
        fresh.load_state_dict(weights, strict=True)
        assert type(fresh.vit.blocks[1]) is type(module.vit.blocks[1])


def test_fit_trains_exactly_as_without_the_callback() -> None:
    weights = []
    for callbacks in ([pruner()], []):
        module = Tiny(drop_rate=0.1)
        L.seed_everything(3)
        trainer(*callbacks, max_epochs=2).fit(module, loader(16, shuffle=True), loader(8))
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_the_random_state_is_untouched() -> None:
    import random

    import numpy as np

    class Noisy(Tiny):
        def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.drawn = getattr(self, "drawn", [])
            legacy = np.random.randn()  # noqa: NPY002  # the global generator is what this is about
            self.drawn.append((random.random(), legacy, torch.rand(1).item()))

    drawn = []
    for callback in (pruner(), pruner(schedule=5), pruner(enabled=False)):
        L.seed_everything(11)
        module = Noisy()
        L.seed_everything(11)
        trainer(callback).validate(module, loader(12, shuffle=True), verbose=False)
        drawn.append(module.drawn)
    assert len(drawn[0]) == 3
    assert drawn[0] == drawn[1] == drawn[2]


class Generated:
    """A loader that is no DataLoader and can be read once."""

    def __init__(self) -> None:
        self.batches = (batch for batch in loader(22))

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def no_loader() -> Generated:
    return Generated()


def stream() -> DataLoader[Any]:
    return DataLoader(Stream(22), batch_size=4)


def workers() -> DataLoader[Any]:
    return loader(22, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize("make", [no_loader, stream, workers])
def test_no_batch_is_lost(make: Any) -> None:
    module, _ = validated(pruner(), data=make())
    assert [step.images for step in module.steps] == [4, 4, 4, 4, 4, 2]
    assert TOKENS not in module.tokens()


def test_limits_and_several_loaders(decisions: list[str]) -> None:
    module, _ = validated(pruner(), data=[loader(8), loader(12)], limit_val_batches=2)
    assert [step.images for step in module.steps] == [4] * 4
    assert len(module.tokens()) == 1
    assert TOKENS not in module.tokens()
    assert decisions == ["plan"]


def test_disabled_is_dense(decisions: list[str]) -> None:
    callback = pruner(enabled=False)
    module, running = validated(callback)
    assert module.tokens() == {TOKENS}
    assert decisions == []
    assert callback.decision is None
    assert not METRICS & set(running.callback_metrics)
    callback.enabled = True
    running.validate(module, loader(), verbose=False)
    assert module.steps[-1].tokens < TOKENS


class Stop(Exception):
    pass


class Interrupting(L.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        raise self.error


def test_model_is_restored_after_an_error_in_a_step() -> None:
    class Failing(Tiny):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)
            if batch_idx == 1:
                raise Stop("in a step")

    module, callback = Failing(), pruner()
    before = Snapshot(module)
    with pytest.raises(Stop, match="in a step"):
        validated(callback, module)
    assert TOKENS not in module.tokens()  # it was pruned when it failed
    before.assert_unchanged()
    module.steps.clear()
    with pytest.raises(Stop):  # and the callback goes on
        validated(callback, module)
    assert TOKENS not in module.tokens()


def test_model_is_restored_after_an_error_in_another_callback() -> None:
    module = Tiny()
    before = Snapshot(module)
    running = trainer(pruner(), Interrupting(Stop("elsewhere")))
    with pytest.raises(Stop, match="elsewhere"):
        running.validate(module, loader(), verbose=False)
    before.assert_unchanged()


def test_model_is_restored_after_ctrl_c() -> None:
    module = Tiny()
    before = Snapshot(module)
    running = trainer(pruner(), Interrupting(KeyboardInterrupt()))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        running.validate(module, loader(), verbose=False)
    assert module.steps[0].tokens < TOKENS
    before.assert_unchanged()


@pytest.mark.parametrize("forward", range(1, 60, 7))
def test_model_is_restored_after_an_error_while_deciding(forward: int) -> None:
    """Fails in some forward pass of profiling, of the accuracy estimate or of the final comparison."""

    class Fragile(Tiny):
        armed = False

        def _count(self, norm: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            super()._count(norm, args)
            if self.armed and self.forwards == forward:
                raise Stop(f"forward {forward}")

    module = Fragile()
    before = Snapshot(module)
    module.forwards, module.armed = 0, True
    with pytest.raises(Stop):
        validated(pruner(time_limit=1e6), module)  # never cut short: the forward passes are the same everywhere
    module.armed = False
    assert module.steps == []
    before.assert_unchanged()


def test_model_is_restored_after_an_error_in_reporting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(decision: Any) -> None:
        raise Stop("reporting")

    monkeypatch.setattr(decider, "print_decision", fail)
    module = Tiny()
    before = Snapshot(module)
    with pytest.raises(Stop, match="reporting"):
        validated(pruner(verbose=True), module)
    before.assert_unchanged()


def test_decision_is_kept_for_a_second_run(decisions: list[str]) -> None:
    callback = pruner()
    module, running = validated(callback)
    first, forwards = callback.decision, module.forwards
    running.validate(module, loader(), verbose=False)
    assert decisions == ["plan"]
    assert callback.decision is first
    assert module.forwards - forwards == 6  # the steps and nothing else
    running.test(module, loader(), verbose=False)
    assert decisions == ["plan"]


@pytest.mark.parametrize("change", ["batch", "precision", "schedule", "objective", "block", "model"])
def test_a_changed_batch_model_or_setting_makes_the_next_run_decide_again(change: str, decisions: list[str]) -> None:
    callback = pruner(schedule=5) if change == "block" else pruner()
    module, running = validated(callback)
    data = loader()
    if change == "batch":
        data = loader(batch_size=6)
    elif change == "precision":
        running = trainer(callback, precision="bf16-mixed")
    elif change == "schedule":
        callback.config = replace(callback.config, schedule=3)
    elif change == "objective":
        callback.config = replace(callback.config, objective=lp.AccuracyBudget(0.01))
    elif change == "block":
        callback.config = replace(callback.config, block=2)
    else:
        module = Tiny()
        with torch.no_grad():
            module.vit.head.weight.mul_(3)
    running.validate(module, data, verbose=False)
    assert len(decisions) == 2


def test_a_decision_keeps_no_model_alive_and_does_not_hold_for_the_next(decisions: list[str]) -> None:
    """The callback keeps no model alive, and decides again for an equal one, which may be at the same address."""
    callback = pruner()
    module, running = validated(callback)
    gone = weakref.ref(module.vit)
    del module, running, callback.log, callback.log_dict  # the last two are methods of the module, by Lightning
    gc.collect()
    assert gone() is None
    validated(callback)
    assert decisions == ["plan", "plan"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_of_the_callback_decides_again(copied: Any, decisions: list[str]) -> None:
    callback = pruner()
    module, _ = validated(callback)
    again = copied(callback)
    assert again.decision.schedule == callback.decision.schedule
    validated(again, module)
    assert decisions == ["plan", "plan"]
    kept = pruner()
    kept.use(callback.decision)
    validated(copied(kept), module)
    assert decisions == ["plan", "plan"]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_runtime_is_parsed_once_a_run(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def parse(spec: str) -> Any:
        parsed.append(spec)
        return parse_runtime(spec)

    monkeypatch.setattr("lightning_prune.callbacks.compiled_run.parse_runtime", parse)
    module, running = validated(pruner(schedule=5, enabled=enabled))
    running.validate(module, loader(), verbose=False)
    assert len(module.steps) == 12
    assert parsed == ["torch", "torch"]


def test_use_runs_an_earlier_decision(decisions: list[str]) -> None:
    first = pruner()
    module, _ = validated(first)
    second = pruner()
    second.use(first.decision)
    other, running = validated(second, data=loader(batch_size=6))
    assert decisions == ["plan"]
    assert other.tokens() == module.tokens()
    assert running.callback_metrics["pruning/removed"] == first.decision.schedule.total_removed


def test_metrics_are_logged_to_callback_metrics_and_loggers(tmp_path: Path) -> None:
    callback = pruner()
    for stage in ("validate", "test", "predict"):
        logger = CSVLogger(tmp_path, name=stage, version=0)
        running = trainer(callback, logger=logger)
        getattr(running, stage)(Tiny(), loader())
        logger.save()
        logged = (tmp_path / stage / "version_0" / "metrics.csv").read_text().splitlines()
        assert set(logged[0].split(",")) >= METRICS
        if stage != "predict":
            metrics = {name: float(running.callback_metrics[name]) for name in METRICS}
            assert metrics == pytest.approx(callback.decision.metrics())
            assert metrics["pruning/speedup"] == pytest.approx(17 / 12)
            assert metrics["pruning/tokens"] + metrics["pruning/removed"] == TOKENS


def test_metrics_of_several_loaders_keep_their_names() -> None:
    _, running = validated(pruner(), data=[loader(), loader()])
    assert set(running.callback_metrics) >= METRICS


def test_fit_logs_the_metrics(tmp_path: Path) -> None:
    running = trainer(pruner(), max_epochs=1, logger=CSVLogger(tmp_path, version=0), log_every_n_steps=1)
    running.fit(Tiny(), loader(8), loader(8))
    assert set(running.callback_metrics) >= METRICS


def test_verbose_prints_the_panel(capsys: pytest.CaptureFixture[str]) -> None:
    callback = pruner(verbose=True)
    validated(callback)
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    removed = callback.decision.schedule.total_removed
    assert told.count("Token pruning") == 1
    assert "VisionTransformer, 0.1 M parameters" in told
    assert callback.decision.context["device"] in told
    assert "4 images, float32" in told
    assert f"{TOKENS} -> {callback.decision.tokens}" in told
    assert f"R = {removed} (pomt: {removed} at block 1)" in told
    assert "dense 17.00 ms (p90 17.00), pruned 12.00 ms (p90 12.00) (predicted " in told
    assert " ms): 1.42x" in told
    assert "judged by 8 images sampled from the dataset, seed 0" in told
    assert "took" in told


def test_verbose_false_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    validated(pruner())
    assert "pruning" not in capsys.readouterr().out


def test_batch_of_another_size_is_pruned_with_one_warning(recwarn: pytest.WarningsRecorder) -> None:
    module, _ = validated(
        pruner(),
        data=DataLoader(
            noise_images(17, seed=1), batch_sampler=[range(4), range(4, 8), [8, 9, 10], [11], range(12, 16)]
        ),
    )
    told = [str(warning.message) for warning in recwarn if "batch size" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("Batch 2 has 3 images; the profile was made at a batch size of 4.")
    assert [step.images for step in module.steps] == [4, 4, 3, 1, 4]
    assert TOKENS not in module.tokens()


@pytest.mark.parametrize(("images", "stage", "count"), [(43, "validate", 0), (43, "test", 0), (11, "validate", 1)])
def test_a_short_last_batch_is_worth_a_warning_where_it_holds_a_tenth_of_the_images(
    images: int, stage: str, count: int, recwarn: pytest.WarningsRecorder
) -> None:
    run = getattr(trainer(pruner(schedule=5, block=1)), stage)
    run(Tiny(), DataLoader(noise_images(images, seed=1), batch_size=4), verbose=False)
    told = [str(warning.message) for warning in recwarn if "batch size of 4" in str(warning.message)]
    assert len(told) == count


def test_later_loaders_need_no_images(recwarn: pytest.WarningsRecorder) -> None:
    class Two(Tiny):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if dataloader_idx == 0:
                super().validation_step(batch, batch_idx)

    module, _ = validated(pruner(), Two(), data=[loader(8), DataLoader(["a caption", "another"])])
    assert module.tokens() != {TOKENS}
    validated(pruner(), Two(), data=[loader(8), loader(6, batch_size=3)])
    assert not [warning for warning in recwarn if "batch size" in str(warning.message)]


def test_a_batch_without_images_is_left_to_the_step() -> None:
    class Patient(Tiny):
        def images(self, batch: Any) -> torch.Tensor:
            return batch if isinstance(batch, torch.Tensor) else batch["images"]["left"]

    batches = [noise_images(4, seed=1), {"images": {"left": noise_images(4, seed=1)}}, noise_images(4, seed=1)]
    module, _ = validated(pruner(), Patient(), data=(batch for batch in batches))
    assert module.seen() == 12
    assert TOKENS not in module.tokens()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("data", [loader(0), iter(())], ids=["length 0", "no length"])
def test_a_run_without_batches_warns(stage: str, data: Any, recwarn: pytest.WarningsRecorder) -> None:
    callback = pruner()
    running = trainer(callback)
    module = Tiny()

    def told() -> list[str]:
        return [str(warning.message) for warning in recwarn if "measured nothing" in str(warning.message)]

    getattr(running, stage)(module, data)
    assert len(told()) == 1
    recwarn.clear()
    getattr(running, stage)(module, loader())
    callback.enabled = False
    getattr(running, stage)(module, data)
    callback.enabled = True
    running.fit_loop.max_epochs = 1
    running.fit(module, loader(4))
    assert told() == []


def test_a_second_token_pruning_in_a_trainer_is_refused() -> None:
    module = Tiny()
    with pytest.raises(lp.ArgumentError, match="TokenPruning callback, got 2"):
        trainer(pruner(), pruner(schedule=3)).validate(module, loader(), verbose=False)
    assert module.steps == []


def test_bf16_mixed_is_profiled_as_it_runs() -> None:
    callback = pruner()
    validated(callback, precision="bf16-mixed")
    assert callback.decision.context["precision"] == "bf16-mixed"


def test_bf16_true_is_profiled_as_it_runs() -> None:
    callback, module = pruner(), Tiny()
    trainer(callback, precision="bf16-true").validate(module, loader(), verbose=False)
    assert callback.decision.context["precision"] == "bfloat16"
    assert TOKENS not in module.tokens()


def test_the_proxy_of_a_feature_extractor_is_cosine_similarity() -> None:
    callback = pruner()
    validated(callback, Tiny(num_classes=0))
    assert callback.decision.plan.proxy == "cosine similarity of features"
    assert "cosine similarity" in callback.decision.reason


class Two(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny_vit().train()


def test_two_transformers_need_module_path() -> None:
    with pytest.raises(lp.UnsupportedModelError, match="`module_path` must be one of 'vit'"):
        validated(pruner(), Two())
    callback = pruner(module_path="vit")
    module, _ = validated(callback, Two())
    assert module.tokens() == {callback.decision.tokens} != {TOKENS}
    module, _ = validated(pruner(module_path="teacher"), Two())
    assert module.tokens() == {TOKENS}
    with pytest.raises(lp.ArgumentError, match=r"`module_path` must be the dotted path .* got 'student'"):
        validated(pruner(module_path="student"), Two())


class Convolutional(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(3, 4, 3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def test_a_module_without_transformer_is_refused() -> None:
    with pytest.raises(lp.UnsupportedModelError, match=r"`model` must contain .*, got Convolutional with Conv2d"):
        validated(pruner(), Convolutional())


def test_outputs_that_are_not_finite_are_refused() -> None:
    module = Tiny()
    with torch.no_grad():
        module.vit.head.bias[0] = float("nan")
    with pytest.raises(lp.DataError, match="not finite for 8 of 8"):
        validated(pruner(), module)
    assert type(module.vit.blocks[1]).__name__ == "Block"


def test_an_accuracy_budget_is_met() -> None:
    callback = pruner(objective=lp.AccuracyBudget(0.5))
    validated(callback)
    decision = callback.decision
    assert "accuracy budget, at most 50% lost" in decision.reason
    assert decision.plan.accuracy >= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_limit": 0}, "`time_limit` must be a number of seconds > 0, got 0"),
        ({"time_limit": "x"}, "`time_limit` must be a number of seconds > 0, got 'x'"),
        ({"time_limit": float("nan")}, "`time_limit` must be a number of seconds > 0, got nan"),
        ({"objective": "speed"}, "`objective` must be an Objective .*, or None, got 'speed'"),
        ({"block": -1}, r"`block` must be an index >= 0, a fraction of the depth in \[0, 1\) or 'auto', got -1"),
        ({"block": 1.0}, "`block` must be .* got 1.0"),
        ({"block": True}, "`block` must be .* got True"),
        ({"method": "auto", "block": 3}, "`block` must be left out with method='auto', which searches all .*, got 3"),
        ({"method": "vwt-intra", "block": "auto"}, "`block` must be left out with vwt-intra, .*, got 'auto'"),
        ({"use_cache": 1}, "`use_cache` must be True or False, got 1"),
        ({"runtime": "tensorrt"}, "`runtime` must be one of 'torch', 'torch.compile', .*, got 'tensorrt'"),
        ({"images_from_batch": 3}, "`images_from_batch` must be a function or None, got 3"),
        ({"enabled": "no"}, "`enabled` must be True or False, got 'no'"),
        ({"verbose": None}, "`verbose` must be True or False, got None"),
        ({"block": "3"}, "`block` must be .* got '3'"),
        ({"calibration": 0}, "`calibration` must be a number of images >= 1, a tensor of images or a loader, got 0"),
        ({"calibration": True}, "`calibration` must be .* got True"),
        ({"calibration": "many"}, "`calibration` must be .* got 'many'"),
        ({"calibration": None}, "`calibration` must be .* got None"),
        ({"module_path": 3}, "`module_path` must be a dotted path or None, got 3"),
        ({"protocol": "papre"}, "`protocol` must be 'deployed' or 'paper', got 'papre'"),
        ({"protocol": None}, "`protocol` must be 'deployed' or 'paper', got None"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"seed": 1.5}, "`seed` must be an integer >= 0, got 1.5"),
        ({"seed": True}, "`seed` must be an integer >= 0, got True"),
        ({"method": "pmot"}, "pmot"),
        ({"schedule": None}, "`schedule` must be .* got None"),
        ({"schedule": True}, "`schedule` must be .* got True"),
        ({"schedule": 2.5}, "`schedule` must be .* got 2.5"),
        ({"schedule": 1.0}, "`schedule` must be .* got 1.0. Write 0 to keep all tokens, 1 to remove one"),
    ],
)
def test_unusable_arguments_are_refused_when_the_callback_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(lp.ArgumentError, match=message):
        TokenPruning(**options)


def test_a_block_beyond_the_depth_is_refused_in_the_run() -> None:
    module = Tiny()
    before = Snapshot(module)
    with pytest.raises(lp.ArgumentError, match=r"`block` .* 0 to 3 .* got 4"):
        validated(pruner(block=4), module)
    assert module.steps == []
    before.assert_unchanged()


def test_paper_protocol_is_exhaustive_and_uses_labels() -> None:
    module = Tiny()
    with torch.no_grad():
        module.vit.head.bias[2] = 100.0  # one image in five is classified rightly
    callback = pruner(method="random", protocol="paper", calibration=24)
    validated(callback, module)
    planned = callback.decision.plan
    assert planned.profile.protocol == "paper"
    assert planned.profile.tokens == tuple(range(2, TOKENS + 1))
    assert {c.schedule.tokens(TOKENS)[-1] for c in planned.front} == set(planned.profile.tokens)
    assert planned.proxy == "top-1 accuracy relative to dense"
    assert callback.decision.tokens == 2  # accuracy is the same everywhere, latency least there
    assert callback.decision.schedule.reducing == {1: TOKENS - 2}
    assert module.tokens() == {2}


def test_paper_protocol_needs_labels() -> None:
    with pytest.raises(lp.ArgumentError, match="`calibration` must have labels with protocol='paper'"):
        validated(pruner(protocol="paper"), data=DataLoader(noise_images(8, seed=1), batch_size=4))


@pytest.mark.long
def test_a_compiled_model_is_pruned_inside_its_compiled_graph() -> None:
    torch._dynamo.reset()
    module = Tiny()
    stop_counting(module.vit)  # the account of tokens is not for the compiler
    before = Snapshot(module)
    module.vit.compile(backend="eager")
    left: list[int] = []
    module.vit.fc_norm.register_forward_pre_hook(lambda _, args: left.append(args[0].shape[1]))
    dense = trainer().predict(module, loader(8))
    callback = pruner(schedule=6)
    pruned = trainer(callback).predict(module, loader(8))
    assert callback.decision.context["compiled"] is True
    assert not torch.allclose(torch.cat(dense), torch.cat(pruned), atol=1e-6)
    with lp.patch(tiny := Tiny(), "pomt", callback.decision.schedule):
        expected = trainer().predict(tiny, loader(8))
    assert torch.allclose(torch.cat(pruned), torch.cat(expected), atol=1e-5)
    module.vit._compiled_call_impl = None
    assert torch.equal(before.before["output"], before._look()["output"])


def test_a_compiled_lightning_module_warns(recwarn: pytest.WarningsRecorder) -> None:
    torch._dynamo.reset()
    module = Tiny()
    stop_counting(module.vit)  # as above
    trainer(pruner(schedule=6)).predict(torch.compile(module, backend="eager"), loader(8))
    lines = [str(warning.message) for warning in recwarn]
    told = [line for line in lines if "around the Vision Transformer, is compiled" in line]
    assert len(told) == 1
    assert "`module.vit.compile()`" in told[0]
    torch._dynamo.reset()


class Watching(L.Callback):
    """Remembers its hooks, and whether the model was patched then."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def _look(self, hook: str, pl_module: Any) -> None:
        self.seen.append((hook, type(pl_module.vit.blocks[1]).__name__ != "Block"))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._look("setup", pl_module)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._look("batch", pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look("epoch", pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look("end", pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._look("teardown", pl_module)


def test_the_callback_moves_to_the_front_and_the_others_keep_their_hooks() -> None:
    """It moves to the front; they keep their order, and miss no hook and get none twice."""
    callback, others = pruner(schedule=5), [Watching(), Watching(), Watching()]
    running = trainer(others[0], others[1], callback, others[2])
    for _ in range(2):
        running.validate(Tiny(), loader(8), verbose=False)
        own = [each for each in vars(running)["callbacks"] if each in (callback, *others)]
        assert own == [callback, *others]
    expected = [("setup", False), ("batch", True), ("batch", True), ("epoch", True), ("end", False)]
    for other in others:
        assert other.seen == [*expected, ("teardown", False)] * 2
