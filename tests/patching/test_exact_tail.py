"""The exact tail: where it is in force outputs are those of the dense model, elsewhere all tokens come out."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from timm.layers import set_reentrant_ckpt
from timm.models.beit import Beit
from timm.models.convit import ConVit
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import lightning_prune as lp
from helpers.models import disturb, tiny_torchvision_vit, tiny_vit
from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.patching import compatibility, find_vision_transformer, has_exact_tail
from lightning_prune.patching.exact_tail import ExactTail
from lightning_prune.reduction import RandomDrop, ReductionOutput, TokenSequence

from .huggingface_models import MODELS, build_hf, outputs_of
from .sweep import coverage

SMALL: dict[str, Any] = {"embed_dim": 32, "num_heads": 4, "depth": 3, "num_classes": 5, "img_size": 20, "patch_size": 4}
TIMM = ["vit", "distilled", "dinov2-registers", "features", "res-post", "parallel-things", "diff-attention"]
POOLED = ["pool-avg", "pool-avg-prefix", "siglip", "pool-map-class", "pool-prr", "no-pool", "no-prefix"]
UNSPLIT = ["parallel-scaling", "diff-parallel-scaling"]
OTHERS: dict[str, Any] = {
    "eva": lambda: coverage.build_small("eva02_tiny_patch14_224", global_pool="token"),
    "dinov3": lambda: coverage.build_small("vit_small_patch16_dinov3", global_pool="token"),
    "naflex": lambda: NaFlexVit(
        NaFlexVitCfg(patch_size=4, embed_dim=32, num_heads=4, depth=3, class_token=True, global_pool="token"), 3, 5
    ),
    "beit": lambda: Beit(**SMALL, use_rel_pos_bias=True, init_values=0.5, global_pool="token"),
    "relpos": lambda: VisionTransformerRelPos(**SMALL, class_token=True, global_pool="token"),
    "convit": lambda: ConVit(**SMALL, local_up_to_layer=1),
    "torchvision": tiny_torchvision_vit,
}
CLASSIFIERS = ["ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"]
TOWERS = ["ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "CLIPVisionModel"]
TOWERS += ["CLIPVisionModelWithProjection"]


def build_other(name: str) -> tuple[Any, Tensor]:
    model = disturb(OTHERS[name]()).double()
    return model, images_of(model)


def images_of(model: Any, batch: int = 2) -> Tensor:
    side = {"VisionTransformer": 32}.get(type(model).__name__, 20) if "torchvision" in type(model).__module__ else None
    size = (side, side) if side else coverage.image_size(model) if hasattr(model, "patch_embed") else (20, 20)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tail_of(model: nn.Module) -> ExactTail | None:
    found: ExactTail | None = vars(find_vision_transformer(model).root)["_prune_patch"].tail
    return found


def ran(model: nn.Module) -> bool | None:
    tail = tail_of(model)
    assert tail is not None
    return tail.ran


@torch.no_grad()
def check_exact(model: Any, images: Tensor, run: Any = None, tail: bool | None = None) -> None:
    """With the tail alone, and with a method; and after both the model is what it was."""
    run = run or (lambda: model(images))
    kind, dense = type(model), run()
    with lp.patch(model, "exact", tail=tail) as handle:
        assert handle.has_tail
        torch.testing.assert_close(run(), dense, rtol=1e-12, atol=1e-12)
        assert ran(model)
    assert type(model) is kind
    depth = handle.transformer.depth
    removed = [0] * (depth - 2) + [3, 2]
    with lp.patch(model, "random", removed, tail=False):
        pruned = run()
    with lp.patch(model, "random", removed, tail=tail) as handle:
        torch.testing.assert_close(run(), pruned, rtol=1e-12, atol=1e-12)
        assert ran(model)
    assert torch.equal(run(), dense)


@pytest.mark.parametrize("name", TIMM)
def test_exact_in_timm(build: Any, name: str) -> None:
    model = build(name, depth=3).double()
    assert has_exact_tail(find_vision_transformer(model))
    check_exact(model, images_of(model))


@pytest.mark.parametrize("name", OTHERS)
def test_exact_in_other_families(name: str) -> None:
    check_exact(*build_other(name))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_exact_in_classifiers_of_hugging_face(name: str) -> None:
    model = build_hf(name).double()
    images = images_of(model)
    check_exact(model, images, lambda: model(images).logits)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_models_that_return_tokens_have_a_tail_if_asked(name: str) -> None:
    model = build_hf(name).double()
    images = images_of(model)
    with lp.patch(model, "random", [0, 0, 3, 2]) as handle:
        assert not handle.has_tail
        assert model(images).last_hidden_state.shape[1] > 20
    assert not has_exact_tail(handle.transformer)
    with pytest.raises(UnsupportedModelError, match="tail=True"):
        lp.patch(model, "exact")
    check_exact(model, images, lambda: outputs_of(model(images)), tail=True)
    with lp.patch(model, "exact", tail=True):
        assert model(images).last_hidden_state.shape[1] == MODELS[name].prefix


def test_models_whose_head_reads_patches_have_none(build: Any) -> None:
    models = [build(name, depth=3) for name in (*POOLED, *UNSPLIT)]
    models += [build_hf(name) for name in MODELS if name not in (*CLASSIFIERS, *TOWERS)]
    models += [coverage.build_small("cait_xxs24_224")]
    for model in models:
        assert not has_exact_tail(find_vision_transformer(model))
        removed = [0] * (find_vision_transformer(model).depth - 1) + [1]
        with lp.patch(model, "random", removed) as handle:
            assert not handle.has_tail
        for method, schedule, tail in (("exact", None, None), ("exact", None, True), ("random", removed, True)):
            with pytest.raises(UnsupportedModelError, match="exact"):
                lp.patch(model, method, schedule, tail=tail)


@torch.no_grad()
def test_exact_after_images_were_scaled(build: Any) -> None:
    for model in (build(depth=3), tiny_torchvision_vit(depth=3), build_hf("ViTForImageClassification")):
        model = model.double()
        images = images_of(model)
        dense = find_vision_transformer(model).outputs(images)
        rows = 4 if "torchvision" in type(model).__module__ else 5
        removed = [rows] + [0] * (find_vision_transformer(model).depth - 1)
        found = []
        for tail in (False, None):
            with lp.patch(model, "resize", removed, tail=tail) as handle:
                assert handle.has_tail is (tail is None)
                found.append(handle.transformer.outputs(images))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
        assert torch.equal(find_vision_transformer(model).outputs(images), dense)


class OwnHead(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x.mean(dim=1))


class OwnForward(VisionTransformer):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.head(self.forward_features(x)[:, 1:].mean(dim=1))


class OwnFeatures(VisionTransformer):
    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward_features(x).flip(1)


class Mixing(nn.Module):
    """An MLP that computes tokens from one another."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", [OwnHead, OwnForward, OwnFeatures])
@torch.no_grad()
def test_none_for_a_forward_that_is_not_known(kind: type[nn.Module], images: Tensor) -> None:
    model = tiny_vit(kind, noise=0.3)
    with pytest.raises(UnsupportedModelError, match="`forward"):
        lp.patch(model, "exact")
    with lp.patch(model, "random", [0, 0, 0, 4], tail=False):
        expected = model(torch.zeros(1, 3, 32, 32))
    with lp.patch(model, "random", [0, 0, 0, 4]):
        assert torch.equal(model(torch.zeros(1, 3, 32, 32)), expected)


def test_none_for_tokens_that_are_computed_from_one_another() -> None:
    for place, part in (("mlp", Mixing()), ("norm", Mixing()), ("norm", nn.BatchNorm1d(17))):
        model = tiny_vit()
        setattr(model.blocks[-1] if place == "mlp" else model, place, part)
        with pytest.raises(UnsupportedModelError, match="from one another"):
            lp.patch(model, "exact")


@torch.no_grad()
def test_all_tokens_come_out_of_everything_but_forward(build: Any, images: Tensor) -> None:
    model = build()
    calls = {
        "forward_features": lambda: [model.forward_features(images)],
        "forward_intermediates": lambda: model.forward_intermediates(images, indices=2, intermediates_only=True),
        "get_intermediate_layers": lambda: list(model.get_intermediate_layers(images, n=2)),
        "blocks": lambda: [model.blocks(torch.ones(1, 26, 32))],
        "last block": lambda: [model.blocks[-1](torch.ones(1, 26, 32))],
    }
    expected = {name: call() for name, call in calls.items()}
    lp.patch(model, "exact")
    model(images)
    for name, call in calls.items():
        assert all(torch.equal(*pair) for pair in zip(call(), expected[name], strict=True)), name
        assert not ran(model)


@torch.no_grad()
def test_hooks_see_all_tokens(build: Any, images: Tensor) -> None:
    model = build()
    dense = model(images)
    lp.patch(model, "exact")
    last = model.blocks[-1]
    for place in (last, last.mlp, last.attn.proj, model.norm, model.blocks, "all"):
        shapes: list[int] = []
        to = register_module_forward_hook if place == "all" else place.register_forward_hook
        hook = to(lambda module, args, output, shapes=shapes: shapes.append(output.shape[1]))
        assert torch.equal(model(images), dense)
        assert shapes
        assert place == "all" or shapes == [26]
        hook.remove()
        model(images)
        assert ran(model)
    for register in (last.register_forward_pre_hook, model.norm.register_forward_pre_hook):
        hook = register(lambda *_: None)
        assert torch.equal(model(images), dense)
        assert not ran(model)
        hook.remove()
    model.head.register_forward_hook(lambda *_: None)  # sees pooled features
    model.blocks[0].register_forward_hook(lambda *_: None)
    model(images)
    assert ran(model)


@torch.no_grad()
def test_what_is_changed_after_patching_counts(build: Any, images: Tensor) -> None:
    model = build()
    lp.patch(model, "exact")
    other = build()
    for each in (model, other):
        each.global_pool = "avg"
    assert torch.equal(model(images), other(images))
    for each in (model, other):
        each.global_pool = "token"
        each.forward_head = lambda x: x.mean(dim=1)
    assert torch.equal(model(images), other(images))
    del model.forward_head
    model(images)
    assert ran(model)


@torch.no_grad()
def test_hidden_states_of_hugging_face_have_all_tokens(tmp_path: Any) -> None:
    model = build_hf("ViTForImageClassification").double()
    images = images_of(model)
    dense = model(images, output_hidden_states=True)
    signature = inspect.signature(model.forward)
    lp.patch(model, "exact")
    assert inspect.signature(model.forward) == signature
    assert type(model).__name__ == "ViTForImageClassification"
    found = model(images, output_hidden_states=True)
    assert all(torch.equal(*pair) for pair in zip(found.hidden_states, dense.hidden_states, strict=True))
    assert not ran(model)
    assert torch.equal(model.vit(images).last_hidden_state, model.vit(images).last_hidden_state)
    assert model.vit(images).last_hidden_state.shape[1] == 26
    assert model(images).hidden_states is None
    assert ran(model)  # although transformers keeps its hooks
    model.config.output_hidden_states = True
    assert model(images).hidden_states[-1].shape[1] == 26
    model.config.output_hidden_states = False
    model.save_pretrained(tmp_path)
    assert '"ViTForImageClassification"' in (tmp_path / "config.json").read_text(encoding="utf-8")


class Refusing(RandomDrop):
    """Fails if it is used in the last block."""

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        assert remove != 2
        return super().reduce(sequence, remove)


@torch.no_grad()
def test_the_last_block_does_not_reduce_beside_the_tail(build: Any, images: Tensor) -> None:
    model = build("dynamic-size")
    with lp.patch(model, Refusing(), [0, 3, 0, 2]) as handle:
        model(images)
        assert handle.schedule.tokens(26) == (26, 23, 23, 21)
        with pytest.raises(AssertionError):
            model.forward_features(images)
    with lp.patch(model, "random", [0, 3, 0, 50]), pytest.raises(ScheduleError, match="at most"):
        model(images)


def test_when_there_is_none(build: Any, images: Tensor) -> None:
    model = build()
    dense = model(images)
    for schedule, tail in (([0, 0, 0, 0], None), ([0, 0, 0, 0], True), ([0, 4, 0, 0], False)):
        assert not lp.patch(model, "random", schedule, tail=tail).has_tail
    handle = lp.patch(model, "random", [0, 4, 0, 0])
    assert handle.has_tail
    handle.update([0, 0, 0, 0])
    assert not handle.has_tail
    assert torch.equal(model(images), dense)
    exact = lp.patch(model, "exact")
    exact.update()
    assert exact.has_tail
    for arguments in (("exact", [0, 4, 0, 0]), ("exact", None, False), ("random", [0, 4, 0, 0], 1)):
        with pytest.raises(ArgumentError):
            lp.patch(model, *arguments[:2], tail=arguments[2] if len(arguments) > 2 else None)


@torch.no_grad()
def test_copies_pickles_and_threads(build: Any, images: Tensor) -> None:
    model = build()
    dense, features = model(images), model.forward_features(images)
    lp.patch(model, "exact")
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        assert ran(other)
        assert tail_of(other).watched[1] is other.blocks[-1]
        lp.patching.unpatch(other)
        assert torch.equal(other(images), dense)

    def serve(number: int) -> bool:
        with torch.no_grad():
            if number % 2:
                return torch.equal(model(images), expected)
            return torch.equal(model.forward_features(images), features)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(serve, range(80)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpoints(build: Any, reentrant: bool) -> None:
    def gradients(tail: bool) -> list[Tensor]:
        model = build(depth=3).double().train()
        model.set_grad_checkpointing()
        if tail:
            lp.patch(model, "exact")
        images = images_of(model).requires_grad_()
        model(images).square().sum().backward()
        assert images.grad is not None
        return [images.grad, *(p.grad for p in model.parameters())]

    set_reentrant_ckpt(reentrant)
    try:
        for found, expected in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    finally:
        set_reentrant_ckpt(False)


def mlp_tokens(graph: torch.fx.GraphModule) -> list[int]:
    """The number of tokens in the MLP of each block, by its activation."""
    nodes = [node for node in graph.graph.nodes if "gelu" in str(node.target)]
    return [int(node.meta.get("val", node.meta.get("example_value")).shape[1]) for node in nodes]


@torch.no_grad()
def test_compiled_as_a_whole_and_exported(build: Any, images: Tensor) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model = build(depth=2)
    dense, features = model(images), model.forward_features(images)
    lp.patch(model, "exact")
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(fast(images), dense, rtol=1e-5, atol=1e-5)
    assert [mlp_tokens(graph) for graph in graphs] == [[26, 1]]
    assert torch.equal(torch.compile(model.forward_features, backend=backend, fullgraph=True)(images), features)
    assert [mlp_tokens(graph) for graph in graphs] == [[26, 1], [26, 26]]
    program = torch.export.export(model, (images,), strict=False)
    assert mlp_tokens(program.graph_module) == [26, 1]
    torch.testing.assert_close(program.module()(images), dense, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compiled_block_by_block(build: Any, images: Tensor) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model = build(depth=2)
    dense, features = model(images), model.forward_features(images)
    lp.patch(model, "exact")
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(model(images), dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.forward_features(images), features, rtol=1e-5, atol=1e-5)
    assert sorted(map(mlp_tokens, graphs)) == [[1], [26], [26]]


def test_the_last_block_is_verified_once(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search patches the same model between two timed runs: nothing may be computed there."""
    model, real, calls = tiny_vit(), compatibility.computes_tokens_alone, list[int]()

    def counted(*args: Any) -> bool:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(compatibility, "computes_tokens_alone", counted)
    handle = lp.patch(model, "topk", [4, 0, 0, 0])
    for removed in (2, 3, 4):
        handle.update([removed, 0, 0, 0])
    assert len(calls) == 1
    for holder, name in ((model, "norm"), (model.blocks[-1], "mlp")):
        own = getattr(holder, name)
        setattr(holder, name, Mixing())
        handle.update([2, 0, 0, 0])
        assert not handle.has_tail
        setattr(holder, name, own)
        handle.update([2, 0, 0, 0])
        assert handle.has_tail
    handle.remove()
    block = model.blocks[-1]
    block.forward = block.forward  # as libraries do that wrap it
    handle.update([2, 0, 0, 0])
    assert not handle.has_tail
    handle.remove()
    del block.forward
    handle.update([2, 0, 0, 0])
    assert handle.has_tail
    handle.remove()
