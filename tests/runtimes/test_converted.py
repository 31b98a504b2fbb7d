"""Runtimes that convert: same outputs as PyTorch, in place and undone, converted once for each thing that matters."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from helpers.models import digits_module, tiny_hugging_face_vit, tiny_vit
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune._utils.trees import tree_leaves
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.planning.latency_model import LatencyModel, ReductionOverhead
from lightning_prune.planning.overhead_probes import shallow_probes, uses_shallow_copy
from lightning_prune.profiling.environment import measurement_context
from lightning_prune.reduction import resolve
from lightning_prune.runtimes import applied_runtime, graph_store, is_compiled, parse_runtime
from lightning_prune.runtimes.base import Runtime
from lightning_prune.runtimes.calibration import calibrating_with
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import export_graph
from lightning_prune.runtimes.graph_store import keeping_graphs
from lightning_prune.runtimes.in_place import force_eager
from lightning_prune.runtimes.token_curve import TokenCurve

SPECS = ("onnxruntime", "openvino")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny(depth: int = 2, **kwargs: Any) -> nn.Module:
    return tiny_vit(depth=depth, embed_dim=24, **kwargs)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Counting(ConvertedRuntime):
    """Runs the graph by PyTorch, and notes the shapes of the images that a graph was made for."""

    name = "counting"

    def __init__(self) -> None:
        self.loaded: list[tuple[int, ...]] = []

    def context(self) -> dict[str, Any]:
        return {"runtime": self.name, "counting": "1.0"}

    def load(self, graph: Any) -> Any:
        self.loaded.append(tuple(graph.inputs[0].shape))
        module = graph.program.module()
        return lambda *tensors: tree_leaves(module(*tensors))

    def load_counts(self, graph: Any) -> Any:
        return lambda count: self.load(graph)


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("method", ["tome"])
def test_outputs_are_those_of_pytorch(spec: str, method: str | None) -> None:
    model, runtime = tiny(), parse_runtime(spec)
    if method is not None:
        lp.patch(model, method, [4, 3])
    with torch.no_grad():
        expected = model(IMAGES)
        run = runtime.prepare(model, IMAGES)
        same(run(IMAGES), expected)
        same(run(IMAGES.flip(0)), expected.flip(0))
    assert not run(IMAGES).requires_grad
    assert not is_compiled(model)


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_of_hugging_face_keeps_its_fields(spec: str) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    transformer = find_vision_transformer(model)
    with torch.no_grad():
        expected = model(IMAGES)
        with parse_runtime(spec).applied(transformer):
            found = model(pixel_values=IMAGES, interpolate_pos_encoding=False)
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    same(found.last_hidden_state, expected.last_hidden_state)
    same(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("spec", [SPECS[0], *(pytest.param(spec, marks=pytest.mark.long) for spec in SPECS[1:])])
def test_one_graph_serves_all_token_counts(spec: str) -> None:
    """Against dropping the same tokens by hand, before block 0."""
    model = tiny()
    transformer, runtime = find_vision_transformer(model), parse_runtime(spec)
    assert isinstance(runtime, ConvertedRuntime)
    curve = TokenCurve(runtime, transformer, IMAGES)
    for count in (17, 3):
        curve.to(count)
        with torch.no_grad():
            tokens = model._pos_embed(model.patch_embed(IMAGES))[:, :count]
            expected = model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))
        same(curve.run()[0], expected)
    assert not any(module.__class__.__name__.startswith("Patched") for module in model.modules())


def test_precision_of_openvino_is_read_back() -> None:
    assert parse_runtime("openvino").context()["runtime_precision"] == "f32"
    chosen = parse_runtime("openvino:precision=f16,threads=1").context()
    assert chosen["runtime_precision"] in ("f16", "bf16", "f32")  # a processor without float16 takes another
    assert chosen["threads"] == 1


def test_conditions_are_part_of_what_a_measurement_depends_on(counting: Counting) -> None:
    transformer = find_vision_transformer(tiny())
    with counting.applied(transformer):
        context = measurement_context(transformer.compiled_root, IMAGES)
    assert (context["runtime"], context["counting"]) == ("counting", "1.0")
    for spec in SPECS:
        assert {"runtime", "threads", "provider", "torch"} <= set(parse_runtime(spec).context())


class TestInPlace:
    @pytest.fixture
    def model(self) -> Iterator[nn.Module]:
        with torch.no_grad():
            yield tiny()

    def test_until_it_ends(self, model: nn.Module, counting: Counting) -> None:
        transformer = find_vision_transformer(model)
        before = [dict(vars(module)) for module in model.modules()]
        expected = model(IMAGES)
        with counting.applied(transformer):
            assert applied_runtime(transformer) is counting
            same(model(IMAGES), expected)
            with counting.applied(transformer):
                same(model(IMAGES), expected)
            assert is_compiled(model)
        assert torch.equal(model(IMAGES), expected)
        assert [dict(vars(module)) for module in model.modules()] == before
        assert counting.loaded == [(2, 3, 32, 32)]

    def test_each_patch_and_shape_has_a_graph_of_its_own_made_once(self, model: nn.Module, counting: Counting) -> None:
        transformer = find_vision_transformer(model)
        schedules = ([5, 0], [0, 5], [5, 0], [0, 5])
        with counting.applied(transformer):
            for schedule in schedules:
                with lp.patch(model, "topk", schedule):
                    with force_eager():
                        expected = model(IMAGES)
                    same(model(IMAGES), expected)
                    same(model(IMAGES), expected)
            assert len(counting.loaded) == 2
            model(IMAGES)
            model(IMAGES[:1])
            model(IMAGES)
        assert counting.loaded[2:] == [(2, 3, 32, 32), (1, 3, 32, 32)]

    def test_other_methods_and_settings_are_told_apart(self, model: nn.Module, counting: Counting) -> None:
        with counting.applied(find_vision_transformer(model)):
            for method in ("topk", "tome", "random", "random:seed=3"):
                with lp.patch(model, method, [5, 0]):
                    with force_eager():
                        expected = model(IMAGES)
                    same(model(IMAGES), expected)
        assert len(counting.loaded) == 4

    @pytest.mark.parametrize("change", ["in place", "another parameter"])
    def test_changed_weights_are_converted_again(self, model: Any, counting: Counting, change: str) -> None:
        transformer = find_vision_transformer(model)
        with counting.applied(transformer):
            model(IMAGES)
            if change == "in place":
                model.head.weight.mul_(2)
            else:
                model.head.weight = nn.Parameter(model.head.weight * 2)
                with lp.patch(model, "topk", [5, 0]):  # looked at whenever something else differs
                    pass
            with force_eager():
                expected = model(IMAGES)
            same(model(IMAGES), expected)

    def test_images_by_keyword(self, counting: Counting) -> None:
        """As users of Hugging Face pass them."""
        model = tiny_hugging_face_vit(image_size=32, patch_size=8)
        with counting.applied(find_vision_transformer(model)):
            found = model(pixel_values=IMAGES, interpolate_pos_encoding=False).last_hidden_state
            with force_eager():
                same(found, model(IMAGES).last_hidden_state)
            with pytest.raises(lp.ArgumentError, match=r"`pixel_values` must be the images .*, got NoneType"):
                model()

    def test_training_and_autocast_are_seen_after_a_first_call(self, model: nn.Module, counting: Counting) -> None:
        with counting.applied(find_vision_transformer(model)):
            model(IMAGES)
            with pytest.raises(lp.ArgumentError, match="`precision` must be '32-true'"), torch.autocast("cpu"):
                model(IMAGES)
            with pytest.raises(lp.ArgumentError, match="evaluation mode"):
                model.train()(IMAGES)

    def test_weights_made_in_inference_mode_cannot_be_exported(self, counting: Counting) -> None:
        with torch.inference_mode():
            model = tiny()
        with counting.applied(find_vision_transformer(model)), pytest.raises(lp.ExportError, match="inference tensor"):
            model(IMAGES)

    def test_forced_eager_runs_pytorch(self, model: nn.Module, counting: Counting) -> None:
        expected = model(IMAGES)
        with counting.applied(find_vision_transformer(model)), force_eager():
            assert torch.equal(model(IMAGES), expected)
        assert counting.loaded == []

    def test_hooks_of_the_user_see_no_export(self, model: Any, counting: Counting) -> None:
        seen: list[Any] = []
        model.blocks[0].register_forward_hook(lambda _, __, output: seen.append(output))
        with (
            pytest.warns(UserWarning, match="The 1 forward hooks .* are not called while 'counting' runs it"),
            counting.applied(find_vision_transformer(model)),
        ):
            model(IMAGES)
        assert seen == []

    def test_what_cannot_be_passed(self, model: nn.Module, counting: Counting) -> None:
        with counting.applied(find_vision_transformer(model)):
            with pytest.raises(lp.ArgumentError, match="`precision` must be '32-true'"), torch.autocast("cpu"):
                model(IMAGES)
            with pytest.raises(lp.ArgumentError, match="got the tensor `attn_mask`"):
                model(IMAGES, attn_mask=torch.ones(1))
            model.train()
            with pytest.raises(lp.ArgumentError, match="evaluation mode"):
                model(IMAGES)

    def test_compiled_and_quantized_models_are_refused(self, counting: Counting) -> None:
        model = tiny()
        model.compile()
        with pytest.raises(lp.ArgumentError, match="compiled already"):
            counting.prepare(model, IMAGES)
        assert "bfloat16" in str(parse_runtime("onnxruntime").unsupported_reason(tiny().bfloat16()))


def test_a_model_that_cannot_be_exported_says_why() -> None:
    class Undecided(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[images > 0] if images.sum() > 0 else images

    with pytest.raises(lp.ExportError, match=r"Undecided cannot be exported by torch\.export: .+"):
        export_graph(Undecided(), (IMAGES,))


def test_profile_and_plan_in_the_runtime(counting: Counting) -> None:
    model = tiny(depth=8, num_classes=5)
    profile = lp.profile_latency(model, IMAGES[:1], counts=[5, 9], runtime=counting, time_limit=1, verbose=False)
    assert profile.tokens == (5, 9, 17)
    assert profile.context["runtime"] == "counting"
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    common = {"calibration": images, "methods": "topk", "profile": profile, "verbose": False}
    budget = lp.LatencyBudget(speedup=1.2)
    plan = lp.plan(model, IMAGES[:1], objective=budget, runtime=counting, time_limit=4, **common)
    assert plan.profile is profile
    assert not is_compiled(model)
    assert applied_runtime(find_vision_transformer(model)) is None
    with pytest.warns(UserWarning, match="runtime counting there, torch here"):
        lp.plan(model, IMAGES[:1], time_limit=1, **common)


def test_overheads_are_measured_in_a_copy_with_few_blocks(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a token in a block takes a millisecond, and a reducing block three more."""
    model = tiny(depth=10)
    transformer, methods = find_vision_transformer(model), {"topk": (resolve("topk"), tuple(range(10)))}
    now = [0.0]

    def run(self: VisionTransformer, images: Tensor) -> None:
        patches = [vars(block).get("_prune_patch") for block in self.blocks]
        tokens = 17.0
        for patch in patches:
            now[0] += 1e-3 * 0.4 * tokens
            tokens -= 0 if patch is None else patch.remove
            now[0] += 1e-3 * (0.6 * tokens + 3 * (patch is not None and patch.remove > 0))

    monkeypatch.setattr(VisionTransformer, "run", run)
    levels = np.arange(3, 18)
    latency = LatencyModel(levels, (levels - 17.0), 170.0, 10, 0.4)
    limit = TimeLimit(None, lambda: now[0])
    with counting.applied(transformer):
        assert uses_shallow_copy(transformer)
        probes = shallow_probes(transformer, IMAGES, methods, {"topk": latency}, None, limit, False)
    aware = replace(latency, overhead=ReductionOverhead(per_block=3.0))
    for schedule, timing in probes["topk"]:
        assert schedule.depth == 10
        assert timing.ratio == pytest.approx(aware.predict(schedule) / 170.0, rel=2e-3)


def test_graphs_of_a_large_model_are_dropped_and_loaded_again(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_store, "_GRAPH_BYTES", 0)
    monkeypatch.setattr(graph_store, "_FEWEST_GRAPHS", 2)
    model = tiny()
    curve = TokenCurve(counting, find_vision_transformer(model), IMAGES)
    with torch.no_grad():
        for count in (17, 9, 5, 5, 9, 17):
            curve.to(count)
            assert curve.run()[0].shape == (2, 5)
        assert len(counting.loaded) == 4  # 17 is loaded again
        counting.loaded.clear()
        with counting.applied(find_vision_transformer(model)):
            for images in (IMAGES, IMAGES[:1], IMAGES.repeat(2, 1, 1, 1), IMAGES):
                model(images)
    assert [shape[0] for shape in counting.loaded] == [2, 1, 4, 2]


class TestOutputsAreChecked:
    """The first graph of a model is compared with PyTorch, whatever it is used for."""

    @staticmethod
    def doubling(monkeypatch: pytest.MonkeyPatch, images: slice = slice(None)) -> Counting:
        load = Counting.load

        def doubled(self: Counting, graph: Any) -> Any:
            run = load(self, graph)

            def wrong(*tensors: Tensor) -> list[Tensor]:
                (found,) = run(*tensors)
                found[images] *= 2
                return [found]

            return wrong

        monkeypatch.setattr(Counting, "load", doubled)
        return Counting()

    def test_wrong_outputs_of_a_dense_model_are_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, runtime = tiny(), self.doubling(monkeypatch)
        with (
            torch.no_grad(),
            runtime.applied(find_vision_transformer(model)),
            pytest.raises(lp.ExportError, match=r"'counting' .*all of the 2 images: the relative error is at least 1"),
        ):
            model(IMAGES)

    def test_wrong_outputs_of_a_patched_model_are_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, runtime = tiny(), self.doubling(monkeypatch)
        lp.patch(model, "topk", [4, 3])
        with torch.no_grad(), runtime.applied(find_vision_transformer(model)):
            with pytest.warns(UserWarning, match="'counting' computes something else"):
                model(IMAGES)
            model(IMAGES)

    def test_one_image_that_differs_is_a_token_flip(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, runtime = tiny(), self.doubling(monkeypatch, slice(1))
        with torch.no_grad(), runtime.applied(find_vision_transformer(model)):
            assert len(model(IMAGES)) == 2


class TestKeepingGraphs:
    @pytest.fixture
    def model(self) -> nn.Module:
        return tiny()

    def run(self, counting: Counting, model: nn.Module, images: Tensor = IMAGES) -> Tensor:
        with torch.no_grad(), counting.applied(find_vision_transformer(model)):
            output: Tensor = model(images)
        return output

    def test_a_runtime_that_is_applied_again_converts_nothing(self, model: nn.Module, counting: Counting) -> None:
        with keeping_graphs(), keeping_graphs():
            first = self.run(counting, model)
            assert torch.equal(self.run(counting, model), first)
            assert len(counting.loaded) == 1
            with lp.patch(model, "topk", [4, 3]):
                pruned = self.run(counting, model)
            assert not torch.equal(pruned, first)
            assert torch.equal(self.run(counting, model), first)
        assert len(counting.loaded) == 2
        self.run(counting, model)
        assert len(counting.loaded) == 3  # freed at the end

    def test_other_models_weights_and_calibration_images_are_converted(
        self, model: nn.Module, counting: Counting
    ) -> None:
        with keeping_graphs():
            self.run(counting, model)
            self.run(counting, tiny())
            assert len(counting.loaded) == 2
            model.load_state_dict({key: 2 * value for key, value in model.state_dict().items()}, assign=True)
            with torch.no_grad():
                same(self.run(counting, model), model(IMAGES))
            assert len(counting.loaded) == 3
            images = IMAGES.clone()
            for _ in range(2):
                with calibrating_with(images):
                    self.run(counting, model)
            assert len(counting.loaded) == 4
            images *= 2
            with calibrating_with(images):
                self.run(counting, model)
            with calibrating_with(images.clone()):
                self.run(counting, model)
            assert len(counting.loaded) == 6


def test_runtimes_are_immutable_and_equal_by_name() -> None:
    known: list[Runtime] = [parse_runtime(spec) for spec in (*SPECS, "onnxruntime:threads=1", "openvino:threads=1")]
    assert len(set(known)) == 4
    assert parse_runtime("onnxruntime:provider=CPUExecutionProvider").name == "onnxruntime"


@pytest.mark.long
def test_the_command_draws_the_curves_of_several_runtimes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_prune.callbacks import TokenPruning
    from lightning_prune.cli.trainer import PruneTrainer

    pruning = TokenPruning(time_limit=0.5, use_cache=False, verbose=False)
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "callbacks": [pruning]}
    module, data = digits_module(shape={"depth": 2}), lp.DigitsData(batch_size=1)
    trainer = PruneTrainer(accelerator="cpu", **options)
    found = trainer.profile(module, datamodule=data, output=str(tmp_path), runtimes=["onnxruntime", "torch"])
    assert found.context["runtime"] == "onnxruntime"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"profile.json", "profile_torch.json", "profile.png"}
    assert lp.LatencyProfile.load(tmp_path / "profile_torch.json").context["runtime"] == "torch"
    printed = capsys.readouterr().out
    assert "onnxruntime" in printed
    assert not is_compiled(module)


@pytest.mark.long
def test_a_validation_runs_every_batch_in_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """18 images in batches of 8, the last of 2: none is run by PyTorch, so that the accuracy is that of the runtime."""
    import lightning as L

    from lightning_prune.callbacks import TokenPruning

    counting = Counting()
    monkeypatch.setattr("lightning_prune.callbacks.compiled_run.parse_runtime", lambda name: counting)
    module = digits_module(shape={"depth": 2})
    images, labels = torch.randn(18, 1, 56, 56), torch.arange(18) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    pruning = TokenPruning("topk", schedule=[20, 0], runtime="onnxruntime", verbose=False)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[pruning])
    trainer.validate(module, loader, verbose=False)
    assert (8, 1, 56, 56) in counting.loaded
    assert (2, 1, 56, 56) in counting.loaded
    assert not is_compiled(module)


class ScalesImages(nn.Module):
    """Scales images down to 5 x 5."""

    def __init__(self, antialias: bool) -> None:
        super().__init__()
        self.antialias = antialias

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.interpolate(images, size=(5, 5), mode="bicubic", antialias=self.antialias)


@pytest.mark.long
def test_what_openvino_computes_wrongly_is_refused() -> None:
    runtime = parse_runtime("openvino")
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(lp.ExportError, match="Resize with antialias"):
        runtime.prepare(ScalesImages(True).eval(), images)
    plain = ScalesImages(False).eval()
    torch.testing.assert_close(runtime.prepare(plain, images)(images), plain(images), rtol=1e-4, atol=1e-4)
    onnx = parse_runtime("onnxruntime").prepare(ScalesImages(True).eval(), images)
    torch.testing.assert_close(onnx(images), ScalesImages(True)(images), rtol=1e-4, atol=1e-4)
