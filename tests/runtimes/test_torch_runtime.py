"""Compiling in place: what is compiled, when it is not, and that nothing of it is left."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lightning_prune as lp
from helpers.models import digits_module, tiny_vit
from lightning_prune.report.plots import plot
from lightning_prune.runtimes import parse_runtime
from lightning_prune.runtimes.base import runtime_of
from lightning_prune.runtimes.in_place import force_eager, is_compiled
from lightning_prune.runtimes.torch_runtime import Compiled, raised_recompile_limit


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiled is whatever was traced: inductor would need a C++ compiler, and minutes."""
    torch.compiler.reset()
    counting = CompileCounter()

    def compile_by_counting(self: nn.Module, mode: str | None = None, **kwargs: Any) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend=counting, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compile_by_counting)
    yield counting
    torch.compiler.reset()


def tiny() -> Any:
    return tiny_vit(depth=3, embed_dim=24)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "blocks"])
def test_the_mode_is_known_while_it_is_applied(mode: Any) -> None:
    """What a user compiled is compiled, but torch does not tell how."""
    model = tiny()
    assert runtime_of(model) is None
    compiled = Compiled(model, mode, list(model.blocks))
    name = "torch.compile" if mode == "default" else f"torch.compile:mode={mode}"
    assert runtime_of(model) == parse_runtime(name)
    assert runtime_of(copy.deepcopy(model)) is None
    compiled.undo()
    assert runtime_of(model) is None
    model.compile()
    assert is_compiled(model)
    assert runtime_of(model) is None


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "blocks"])
def test_a_compiled_model_gives_the_same_outputs_and_is_restored(mode: Any, counter: Any) -> None:
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    before = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad(), raised_recompile_limit():
        expected = model(images)
        compiled = Compiled(model, mode, list(model.blocks))
        assert is_compiled(model)
        torch.testing.assert_close(model(images), expected)
        assert counter.frame_count > 0
        compiled.undo()
        counter.clear()
        assert torch.equal(model(images), expected)
    assert not is_compiled(model)
    assert counter.frame_count == 0
    assert [dict(vars(module)) for module in model.modules()] == before


def test_blocks_of_one_shape_share_a_graph(counter: Any) -> None:
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    Compiled(model, "blocks", list(model.blocks))
    with torch.no_grad():
        model(images)
        assert counter.frame_count == 1
        with lp.patch(model, "pomt", lp.Schedule.single(3, 1, 5)):
            model(images)
        assert counter.frame_count <= 4  # the reducing block, and those on 12 tokens


@pytest.mark.long
def test_every_count_has_a_graph_of_its_own(counter: Any) -> None:
    """None on symbols, which a deployed model would not have either."""
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    Compiled(model, "default")
    with torch.no_grad(), raised_recompile_limit(), lp.patch(model, "pomt", lp.Schedule.single(3, 1, 2)) as handle:
        for removed in (2, 4, 6, 4, 2):
            handle.update(lp.Schedule.single(3, 1, removed))
            model(images)
    assert counter.frame_count == 3


def test_a_compiled_model_is_not_compiled_again(counter: Any) -> None:
    model = tiny()
    Compiled(model, "default")
    with pytest.raises(lp.ArgumentError, match=r"`mode` .* got 'blocks'"):
        Compiled(model, "blocks", list(model.blocks))
    wrapper: Any = torch.compile(tiny())
    assert is_compiled(wrapper)
    with pytest.raises(lp.ArgumentError, match="compiled already"):
        Compiled(wrapper, "default")


def test_force_eager_runs_and_compiles_no_graph(counter: Any) -> None:
    model = tiny()
    Compiled(model, "default")
    with torch.no_grad(), force_eager():
        model(torch.randn(2, 3, 32, 32))
    assert counter.frame_count == 0


def test_outputs_of_cuda_graphs_outlive_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph writes to the same memory each time, as this stand-in does."""
    memory = torch.zeros(2, 3)
    steps: list[str] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append("step"))

    def replay(self: nn.Module, **_: Any) -> None:
        self._compiled_call_impl = lambda images: {"logits": memory.copy_(images), "hidden": None}

    monkeypatch.setattr(nn.Module, "compile", replay)
    model: Callable[..., Any] = nn.Identity()
    Compiled(model, "reduce-overhead")
    first, second = model(torch.ones(2, 3)), model(torch.full((2, 3), 2.0))
    assert first["logits"].tolist() == [[1.0] * 3] * 2
    assert second["logits"].tolist() == [[2.0] * 3] * 2
    assert second["hidden"] is None
    assert steps == ["step", "step"]


def test_a_compiled_classifier_runs_short_batches_eagerly_and_compiles_once(counter: Any) -> None:
    """18 images in batches of 8: the last has 2."""
    import lightning as L

    module = digits_module(shape={"depth": 2}, runtime="torch.compile")
    plain = copy.deepcopy(module)  # a copy is not compiled
    assert not is_compiled(plain)
    images, labels = torch.randn(18, 1, 56, 56), torch.arange(18) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.validate(module, loader, verbose=False)
    assert counter.frame_count == 1
    predicted = torch.cat(trainer.predict(module, loader))
    assert counter.frame_count == 1
    (expected,) = trainer.validate(plain, loader, verbose=False)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-5)
    torch.testing.assert_close(predicted, plain.eval()(images))
    assert not is_compiled(pickle.loads(pickle.dumps(module)))


def test_blocks_of_a_classifier_are_compiled(counter: Any) -> None:
    module = lp.ImageClassifier("vit_digits_patch4_56", pretrained=False, runtime="torch.compile:mode=blocks")
    assert all(is_compiled(block) for block in module.model.blocks)
    assert vars(module.model).get("_compiled_call_impl") is None
    with pytest.raises(lp.ArgumentError, match=r"`mode` must be .* got 'quickly'"):
        lp.ImageClassifier("vit_digits_patch4_56", pretrained=False, runtime="torch.compile:mode=quickly")


@pytest.mark.long
def test_a_run_is_profiled_planned_and_validated_compiled(counter: Any) -> None:
    import lightning as L

    from lightning_prune.callbacks import TokenPruning

    module = digits_module(shape={"depth": 2})
    before = [dict(vars(each)) for each in module.model.modules()]
    images, labels = torch.randn(18, 1, 56, 56), torch.arange(18) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    seen: list[tuple[bool, int]] = []

    class Watcher(L.Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            seen.append((is_compiled(module.model), counter.frame_count))

    pruner = TokenPruning("pomt", schedule=60, block=1, runtime="torch.compile", time_limit=3, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[pruner, Watcher()],
    )  # fmt: skip
    trainer.validate(module, loader, verbose=False)
    assert pruner.decision.context["compiled"] is True
    assert [compiled for compiled, _ in seen] == [True] * 3
    assert len({count for _, count in seen}) == 1  # what ran was what had been timed, and no graph was made of 2 images
    assert [dict(vars(each)) for each in module.model.modules()] == before
    frames = counter.frame_count
    torch.compile(lambda x: -x, backend=counter)(torch.ones(3))
    assert counter.frame_count == frames + 1  # the last batch ran eagerly; what comes after the run is compiled again
    pruner.enabled = False
    seen.clear()
    trainer.validate(module, loader, verbose=False)
    assert all(compiled for compiled, _ in seen)  # dense, and compiled all the same: what pruned is compared with
    assert not is_compiled(module.model)
    assert copy.deepcopy(pruner).config.runtime == "torch.compile"

    compiled = lp.ImageClassifier("vit_digits_patch4_56", pretrained=False, runtime="torch.compile:mode=blocks")
    with pytest.raises(lp.ArgumentError, match=r"`runtime` must be 'torch.compile:mode=blocks'.* got 'torch.compile'"):
        trainer.validate(compiled, loader, verbose=False)
    with pytest.raises(lp.ArgumentError, match=r"`mode` must be .* got 'slowly'"):
        TokenPruning(runtime="torch.compile:mode=slowly")


def test_a_failing_run_leaves_nothing_compiled(counter: Any) -> None:
    import lightning as L

    from lightning_prune.callbacks import TokenPruning

    class Failing(lp.ImageClassifier):
        def validation_step(self, *_: Any) -> None:
            raise KeyboardInterrupt

    module = digits_module(Failing, shape={"depth": 2})
    runtime = "torch.compile:mode=blocks"
    pruner = TokenPruning("pomt", schedule=60, block=1, runtime=runtime, time_limit=1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[pruner]
    )
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.validate(module, lp.DigitsData(batch_size=4), verbose=False)
    assert not is_compiled(module.model)


@pytest.mark.long
def test_profile_shows_the_eager_curve_beside_the_compiled_one(counter: Any, tmp_path: Any, capsys: Any) -> None:
    from lightning_prune.callbacks import TokenPruning
    from lightning_prune.cli.trainer import PruneTrainer

    module = digits_module(shape={"depth": 2})
    trainer = PruneTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[TokenPruning("pomt", runtime="torch.compile", time_limit=2, verbose=False, block=1)],
    )  # fmt: skip
    profile = trainer.profile(module, datamodule=lp.DigitsData(batch_size=4), output=str(tmp_path))
    eager = lp.LatencyProfile.load(tmp_path / "profile_torch.json")
    assert profile.context["compiled"] is True
    assert eager.context["compiled"] is False
    assert eager.tokens == profile.tokens
    assert counter.frame_count >= len(profile.tokens)
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    assert "torch.compile" in capsys.readouterr().out
    assert not is_compiled(module)
    labels = [text.get_text() for text in plot(profile, others=[eager]).legends[0].get_texts()]
    assert {"measured, torch.compile", "measured, torch"} <= set(labels)
