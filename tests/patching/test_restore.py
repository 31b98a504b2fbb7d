"""Dense readers of a patched model get all tokens, and nothing else about the model changes."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.gemma4_vit import Gemma4VitClassifier, Gemma4VitEncoder
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import lightning_prune as lp
from helpers.models import disturb, tiny_torchvision_vit, tiny_vit
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.patched_block import patch_key
from lightning_prune.patching.token_state import get_state
from lightning_prune.reduction import RandomDrop, TokenSequence, portable_graph

from .huggingface_models import SMALL, build_hf
from .sweep import coverage

SINGLE = ["pomt", "pomt-nearest", "topk", "evit", "random", "shift", "tome", "pitome", "soft-merge", "diffrate-merge"]
SCHEDULE = [0, 5, 0, 4]
TIMM_NAMES = [
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
    "deit_small_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "naflexvit_base_patch16_gap",
    "cait_xxs24_224",
]


def images_of(model: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    size = coverage.image_size(model)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def vit(**options: Any) -> Any:
    return tiny_vit(dtype=torch.float64, noise=0.1, **options)


def pictures(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)


def naive_taps(model: Any, images: Tensor, block: int, remove: int, mode: str) -> list[Tensor]:
    """Outputs of all blocks with `remove` random patches gone between attention and MLP of one block, in loops."""
    x, taps = model.norm_pre(model._pos_embed(model.patch_embed(images))), []
    prefix, kept = model.num_prefix_tokens, None
    at_cut = left_at_cut = x
    for index, layer in enumerate(model.blocks):
        x = x + layer.attn(layer.norm1(x))
        if index == block:
            at_cut = x
            found = RandomDrop().reduce(TokenSequence(x, prefix, True), remove)
            x, kept = found.tokens, found.positions
            left_at_cut = x
        x = x + layer.mlp(layer.norm2(x))
        if kept is None:
            taps.append(x)
            continue
        full = torch.empty_like(at_cut)
        for b in range(len(x)):
            places = kept[b].tolist()
            for i in range(at_cut.shape[1]):
                if i in places:
                    full[b, i] = x[b, places.index(i)]
                    continue
                far = [float((at_cut[b, i] - left_at_cut[b, k]).norm()) for k in range(prefix, len(places))]
                order = sorted(range(len(far)), key=lambda k: far[k])
                if mode == "copy":
                    full[b, i] = x[b, prefix + order[0]]
                else:
                    change = [x[b, prefix + k] - left_at_cut[b, prefix + k] for k in order[:10]]
                    full[b, i] = at_cut[b, i] + torch.stack(change).mean(0)
        taps.append(full)
    return taps


@torch.no_grad()
@pytest.mark.parametrize("mode", ["auto", "copy", "delta"])
@pytest.mark.parametrize("batch", [1, 3])
def test_taps_are_those_of_a_loop(mode: Any, batch: int) -> None:
    model, images = vit(), pictures(batch)
    expected = naive_taps(model, images, 1, 7, mode)
    with lp.patch(model, "random", [0, 7, 0, 0], restore=mode):
        last, found = model.forward_intermediates(images)
        normed = model.forward_intermediates(
            images, indices=[1, 3], norm=True, output_fmt="NLC", intermediates_only=True
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.flatten(2).transpose(1, 2), other[:, 1:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, model.norm(expected[3]), rtol=1e-10, atol=1e-10)
    for one, index in zip(normed, (1, 3), strict=True):
        torch.testing.assert_close(one, model.norm(expected[index])[:, 1:], rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("mode", ["auto", "copy", "delta"])
def test_every_method_gives_all_tokens_back(method: str, mode: Any) -> None:
    model, images = vit(), pictures()
    dense_last, dense = model.forward_intermediates(images)
    logits = {}
    with lp.patch(model, method, SCHEDULE, tail=False) as handle:
        logits["none"] = model(images)
        lengths = [x.shape[1] for x in model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)]
    with lp.patch(model, method, SCHEDULE, restore=mode, tail=False):
        last, found = model.forward_intermediates(images)
        logits["restored"] = model(images)
        features = model.forward_features(images)
    assert lengths == [16, 11, 11, 7]
    assert torch.equal(logits["none"], logits["restored"])  # a head that reads the class token is given none back
    assert torch.equal(found[0], dense[0])
    assert torch.equal(features, last)
    assert [x.shape for x in found] == [x.shape for x in dense]
    assert last.shape == dense_last.shape
    assert all(not torch.equal(one, other) for one, other in zip(found[1:], dense[1:], strict=True))
    assert not handle.active


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM_NAMES)
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_families_of_timm(name: str, method: str) -> None:
    if (name, method) == ("cait_xxs24_224", "tome"):
        method = "tome:proportional_attention=false"
    model = disturb(coverage.build_small(name)).double().eval()
    images = images_of(model)
    transformer = find_vision_transformer(model)
    schedule = [0] * transformer.depth
    schedule[1], schedule[-1] = 3, 2
    dense = model.forward_intermediates(images, intermediates_only=True)
    with lp.patch(model, method, schedule) as handle:
        with pytest.raises(UnsupportedModelError, match="output_fmt"):
            model.forward_intermediates(images)
        short = model.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
        handle.remove()
    with lp.patch(model, method, schedule, restore="auto"):
        found = model.forward_intermediates(images, intermediates_only=True)
        again = model.forward_intermediates(images, intermediates_only=True, indices=[1])
        features = model.forward_features(images)
    assert [x.shape for x in found] == [x.shape for x in dense]
    assert torch.equal(found[0], dense[0])
    assert torch.equal(again[0], found[1])
    # What is left without restoring stands in the grid with it, bit by bit.
    grid = found[-1].flatten(2).transpose(1, 2)
    for b in range(len(images)):
        rows = {tuple(row.tolist()) for row in grid[b]}
        assert all(tuple(row.tolist()) in rows for row in short[-1][b])
    if isinstance(features, Tensor) and features.ndim == 3:  # the class token of CaiT enters after the blocks
        prefix = 1 if "cait" in name else transformer.num_prefix_tokens
        assert features.shape[1] == grid.shape[1] + prefix
    torch.testing.assert_close(model.forward_intermediates(images, intermediates_only=True), dense, rtol=0, atol=0)


@torch.no_grad()
def test_nothing_is_removed_by_an_empty_schedule() -> None:
    model, images = vit(), pictures()
    dense = model.forward_intermediates(images)
    with lp.patch(model, "tome", [0, 0, 0, 0], restore="auto"):
        found = model.forward_intermediates(images)
    assert torch.equal(found[0], dense[0])
    assert all(torch.equal(one, other) for one, other in zip(found[1], dense[1], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "pomt-nearest", "diffrate-merge"])
def test_equal_patches_are_exact(method: str) -> None:
    """Merged copies of a patch, whose sizes are counted, are what the dense model computes."""
    model = vit(pos_embed="none", class_token=False, global_pool="avg")
    tile = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = tile.repeat(1, 1, 4, 4)
    dense = model.forward_intermediates(images)
    with lp.patch(model, method, SCHEDULE, restore="auto"):
        found = model.forward_intermediates(images)
    torch.testing.assert_close(found, dense, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_mixed_schedule_restores_each_cut_by_its_method() -> None:
    model, images = vit(), pictures()
    schedule = lp.Schedule([0, 5, 0, 4], method=[None, "topk", None, "tome"])
    dense = model.forward_intermediates(images, intermediates_only=True)
    with lp.patch(model, schedule, restore="auto"):
        found = model.forward_intermediates(images, intermediates_only=True)
        key = patch_key(model)
    with lp.patch(model, schedule, restore="copy"):
        copies = model.forward_intermediates(images, intermediates_only=True)
        assert patch_key(model) != key
    assert [x.shape for x in found] == [x.shape for x in dense]
    assert not torch.equal(found[1], copies[1])


@torch.no_grad()
def test_the_sequence_stays_short_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.patching import patched_block

    model, images, made = vit(), pictures(), []
    original = patched_block.restored
    monkeypatch.setattr(patched_block, "restored", lambda x, cuts: (made.append(x.shape[1]), original(x, cuts))[1])
    with lp.patch(model, "tome", SCHEDULE, restore="auto"):
        model(images)
        assert made == []
        model.forward_intermediates(images, indices=[2], intermediates_only=True)
        assert made == [12]
        made.clear()
        model.forward_intermediates(images, indices=2)
        assert made == [12, 8]
        made.clear()
        model.forward_intermediates(images, indices=[0, 1], intermediates_only=True, stop_early=True)
        assert made == [12]
        made.clear()
        model.get_intermediate_layers(images, n=1, reshape=True)
        assert made == [8]
        made.clear()
        model.forward_features(images)
        assert made == [8]
        made.clear()
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:  # code that is not known to leave any output out
            x = block(x)
            assert x.shape[1] == 17
        assert made == [12, 12, 8]


@torch.no_grad()
def test_pooled_models_read_all_tokens() -> None:
    model, images = vit(class_token=False, global_pool="avg"), pictures()
    with lp.patch(model, "topk", [0, 6, 0, 0], restore="auto"):
        features, logits = model.forward_features(images), model(images)
    assert features.shape == (2, 16, 32)
    torch.testing.assert_close(logits, model.forward_head(features))


@torch.no_grad()
def test_features_only_wrapper() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(1, 3), **options).double().eval()
    dense = net(pictures())
    with lp.patch(net, "tome", SCHEDULE, restore="auto"):
        found = net(pictures())
    assert [x.shape for x in found] == [x.shape for x in dense]


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for each in handles:
            each.remove()


@torch.no_grad()
def test_hooks_see_all_tokens() -> None:
    model, images = vit(), pictures()
    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        taps = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True)
        logits = model(images)
        with outputs_of({"1": model.blocks[1], "2": model.blocks[2]}) as seen:
            assert torch.equal(model(images), logits)
        for name, x in seen.items():
            assert torch.equal(x, torch.cat(taps[int(name)][::-1], 1))
        with outputs_of({"norm": model.norm}) as seen:
            model(images)
        assert seen["norm"].shape[1] == 17
        entering = []
        hook = model.blocks[3].register_forward_pre_hook(lambda m, args: entering.append(args[0].shape[1]))
        model(images)
        hook.remove()
        assert entering == [17]


@torch.no_grad()
def test_torchvision_by_hooks() -> None:
    torch.manual_seed(0)
    model: Any = disturb(tiny_torchvision_vit()).double()
    images = pictures()
    layers = {str(i): layer for i, layer in enumerate(model.encoder.layers)}
    with lp.patch(model, "tome", SCHEDULE, restore="auto"):
        logits = model(images)
        with outputs_of({**layers, "encoder": model.encoder}) as seen:
            torch.testing.assert_close(model(images), logits)
    assert {x.shape for x in seen.values()} == {(2, 17, 32)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"])
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_hidden_states_of_hugging_face(name: str, method: str) -> None:
    model = build_hf(name).double()
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = model(images, output_hidden_states=True)
    with lp.patch(model, method, SCHEDULE, restore="auto"):
        found = model(images, output_hidden_states=True)
        plain = model(images)
    assert [x.shape for x in found.hidden_states] == [x.shape for x in dense.hidden_states]
    assert found.last_hidden_state.shape == dense.last_hidden_state.shape
    assert torch.equal(found.hidden_states[1], dense.hidden_states[1])
    assert torch.equal(plain.last_hidden_state, found.last_hidden_state)
    assert plain.pooler_output is None or torch.equal(plain.pooler_output, found.pooler_output)
    after = model(images, output_hidden_states=True)
    assert all(torch.equal(one, other) for one, other in zip(after.hidden_states, dense.hidden_states, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel"])
def test_towers_of_hugging_face(name: str) -> None:
    model = build_hf(name).double()
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = model(images, output_hidden_states=True)
    with lp.patch(model, "pomt", SCHEDULE, restore="auto"):
        found = model(images, output_hidden_states=True)
    assert [x.shape for x in found.hidden_states] == [x.shape for x in dense.hidden_states]
    assert found.last_hidden_state.shape == dense.last_hidden_state.shape


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "topk"])
@pytest.mark.parametrize("side", [32, 24])
def test_scaled_images_give_the_grid_back(method: str, side: int) -> None:
    model = vit(dynamic_img_size=side != 32)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = model.forward_intermediates(images)
    cells = (side // 8) ** 2
    with lp.patch(model, "resize", [cells - (side // 8 - 1) ** 2, 0, 0, 0], restore="auto") as handle:
        last, found = model.forward_intermediates(images)
        assert torch.equal(model.forward_features(images), last)
        handle.remove()
    assert [x.shape for x in found] == [x.shape for x in dense[1]]
    schedule = lp.Schedule([cells - (side // 8 - 1) ** 2, 0, 2, 0], method=["resize", None, method, None])
    with lp.patch(model, schedule, restore="auto"):
        last, mixed = model.forward_intermediates(images)
    assert [x.shape for x in mixed] == [x.shape for x in dense[1]]
    assert torch.equal(mixed[0], found[0])
    torch.testing.assert_close(model.forward_intermediates(images), dense, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("method", ["vwt-intra", "vwt-inter"])
def test_visual_words_give_tokens_back(method: str, tmp_path: Any) -> None:
    model, images = vit(), pictures(3)
    dense = model.forward_intermediates(images)
    if method == "vwt-intra":
        patched = lp.patch(model, method, [6, 0, 0, 0], restore="auto")
    else:
        from lightning_prune.reduction import VWTInter
        from lightning_prune.reduction.word_learning import learn_vocabulary

        words = learn_vocabulary(pictures(8, torch.float32).split(4), patch_size=8, words=3)
        patched = lp.patch(model, VWTInter(words, threshold=2.0), restore="auto")
    with patched:
        last, found = model.forward_intermediates(images)
        alone = model.forward_intermediates(images[1:2])[0]
    assert [x.shape for x in found] == [x.shape for x in dense[1]]
    torch.testing.assert_close(last[1:2], alone)


BACKBONES = {
    "Dinov2Backbone": (transformers.Dinov2Config, {}),
    "Dinov2WithRegistersBackbone": (transformers.Dinov2WithRegistersConfig, {"num_register_tokens": 3}),
    "DINOv3ViTBackbone": (transformers.DINOv3ViTConfig, {"num_register_tokens": 3}),
}


def backbone_config(name: str) -> Any:
    kind, more = BACKBONES[name]
    stem = ["stem"] if name.startswith("Dinov2") else []
    return kind(**SMALL, **more, out_features=[*stem, "stage2", "stage4"])


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_backbones_of_hugging_face(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.patching import patched_block

    torch.manual_seed(0)
    model = disturb(getattr(transformers, name)(backbone_config(name))).double()
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = model(images).feature_maps
    with pytest.raises(UnsupportedModelError, match="restore"):
        lp.patch(model, method, SCHEDULE)
    made: list[int] = []
    original = patched_block.restored
    monkeypatch.setattr(patched_block, "restored", lambda x, cuts: (made.append(x.shape[1]), original(x, cuts))[1])
    with lp.patch(model, method, SCHEDULE, restore="auto"):
        found = model(images).feature_maps
        assert len(made) == 2  # of the three blocks after the first cut
        every = model(images, output_hidden_states=True).hidden_states
    assert [x.shape for x in found] == [x.shape for x in dense]
    assert {x.shape for x in every} == {every[0].shape}
    assert len(dense) == 2 or torch.equal(found[0], dense[0])  # of what enters block 0
    assert not torch.equal(found[-1], dense[-1])
    for one, other in zip(model(images).feature_maps, dense, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_depth_models_of_hugging_face(method: str) -> None:
    torch.manual_seed(0)
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(
            **SMALL, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False
        ),
        patch_size=4,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    model = disturb(transformers.DepthAnythingForDepthEstimation(config)).double()
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = model(images).predicted_depth
    with lp.patch(model, method, SCHEDULE, restore="auto"):
        found = model(images).predicted_depth
    assert found.shape == dense.shape
    assert not torch.equal(found, dense)
    assert torch.equal(model(images).predicted_depth, dense)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViTForMaskedImageModeling", "DeiTForMaskedImageModeling"])
def test_models_that_reconstruct_images(kind: str) -> None:
    config = transformers.ViTConfig if kind.startswith("ViT") else transformers.DeiTConfig
    torch.manual_seed(0)
    model = disturb(getattr(transformers, kind)(config(**SMALL, encoder_stride=4))).double()
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = model(images).reconstruction
    with pytest.raises(UnsupportedModelError, match="restore"):
        lp.patch(model, "tome", SCHEDULE)
    with lp.patch(model, "tome", SCHEDULE, restore="auto"):
        found = model(images).reconstruction
    assert found.shape == dense.shape
    assert not torch.equal(found, dense)


ENCODER: dict[str, Any] = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}
QWEN: dict[str, Any] = {"merge_size": 2, "pos_embed_grid_size": 5}
GEMMA: dict[str, Any] = {"head_dim": 8, "intermediate_size": 64}
GRID_ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "qwen": lambda: Qwen3VitEncoder(**ENCODER, **QWEN),
    "qwen merge": lambda: Qwen3VitEncoder(**ENCODER, **QWEN, global_pool="merge", out_features=8),
    "qwen classifier": lambda: Qwen3VitClassifier(**ENCODER, **QWEN, num_classes=5),
    "deepseek": lambda: DeepseekVitEncoder(**ENCODER, global_pool=""),
    "deepseek align": lambda: DeepseekVitEncoder(**ENCODER, out_features=8),
    "deepseek classifier": lambda: DeepseekVitClassifier(**ENCODER, num_classes=5),
    "gemma": lambda: Gemma4VitEncoder(**ENCODER, **GEMMA, global_pool="none"),
    "gemma soft": lambda: Gemma4VitEncoder(**ENCODER, **GEMMA, num_kv_heads=2),
    "gemma classifier": lambda: Gemma4VitClassifier(**ENCODER, **GEMMA, num_classes=5),
}


@torch.no_grad()
@pytest.mark.parametrize("name", GRID_ENCODERS)
@pytest.mark.parametrize("method", ["tome", "topk", "pomt"])
def test_encoders_that_fold_their_tokens_into_the_grid(name: str, method: str) -> None:
    torch.manual_seed(0)
    model: Any = disturb(GRID_ENCODERS[name]()).double()
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense, taps = model(images), model.forward_intermediates(images, intermediates_only=True)
    with pytest.raises(UnsupportedModelError, match="restore"):
        lp.patch(model, method, SCHEDULE)
    with lp.patch(model, method, SCHEDULE, restore="auto"):
        found, restored = model(images), model.forward_intermediates(images, intermediates_only=True)
        alone = model(images[1:])
    assert found.shape == dense.shape
    assert not torch.equal(found, dense)
    torch.testing.assert_close(found[1:], alone)
    assert [x.shape for x in restored] == [x.shape for x in taps]
    assert torch.equal(restored[0], taps[0])
    assert torch.equal(model(images), dense)
    with pytest.raises(UnsupportedModelError, match="grid"):
        lp.patch(model, "resize", [11, 0, 0, 0], restore="auto")


class Taps(nn.Module):
    """A dense model: two outputs of blocks, side by side."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.transformer.forward_intermediates(images, indices=[1, 3], intermediates_only=True), 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("topk", "auto"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [("tome", "auto"), ("topk", "copy"), ("pomt", "copy")]
        ),
    ],
)
def test_compiles_and_exports(method: str, mode: Any) -> None:
    model, images = Taps(tiny_vit(noise=0.1)).eval(), pictures(dtype=torch.float32)
    with lp.patch(model, method, SCHEDULE, restore=mode):
        expected = model(images)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected)
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), expected)
        with portable_graph():
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
            portable = torch.export.export(model, (images,))
        torch.testing.assert_close(portable.module()(images), expected, rtol=1e-4, atol=1e-4)
    targets = {str(node.target) for node in portable.graph.nodes}
    assert not [t for t in targets if any(word in t for word in ("topk", "sort", "scatter", "cumsum", "index_select"))]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_gradients(method: str, reentrant: bool) -> None:
    model, images = vit(), pictures()

    def loss(inputs: Tensor, wrap: Callable[..., Tensor]) -> Tensor:
        x, taps = model._pos_embed(model.patch_embed(inputs)), []
        for block in model.blocks:
            x = wrap(block, x)
            taps.append(x)
        return torch.stack(taps[1:]).square().mean()

    with lp.patch(model, method, SCHEDULE, restore="auto"):
        plain = images.clone().requires_grad_()
        loss(plain, lambda block, x: block(x)).backward()
        again = images.clone().requires_grad_()
        if reentrant:
            with pytest.raises(UnsupportedModelError, match="use_reentrant"):
                loss(again, lambda block, x: checkpoint(block, x, use_reentrant=True)).backward()
            return
        loss(again, lambda block, x: checkpoint(block, x, use_reentrant=False)).backward()
    assert plain.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(again.grad, plain.grad)


def test_frozen_blocks_need_no_gradients() -> None:
    model, images = vit(), pictures()
    model.requires_grad_(False)
    model.blocks[2:].requires_grad_(True)
    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        torch.stack(model.forward_intermediates(images, intermediates_only=True)).square().mean().backward()
        again = [checkpoint(block, images.new_ones(2, 17, 32), use_reentrant=False) for block in model.blocks[:1]]
    assert model.blocks[3].mlp.fc1.weight.grad is not None
    assert again[0].shape == (2, 17, 32)


def test_gradients_are_those_of_differences() -> None:
    model, images = vit(), pictures(1)

    def loss(inputs: Tensor) -> Tensor:
        return torch.stack(model.forward_intermediates(inputs, intermediates_only=True)).square().mean()

    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        leaf = images.clone().requires_grad_()
        loss(leaf).backward()
        assert leaf.grad is not None
        step = torch.randn(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        with torch.no_grad():
            change = (loss(images + 1e-6 * step) - loss(images - 1e-6 * step)) / 2e-6
    torch.testing.assert_close((leaf.grad * step).sum(), change, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["tome", "topk"])
@pytest.mark.parametrize("chunk", [2, 4])
def test_checkpoints_of_several_blocks_and_of_the_model(method: str, chunk: int) -> None:
    model, images = vit(), pictures()
    with lp.patch(model, method, SCHEDULE, restore="auto"):
        plain = images.clone().requires_grad_()
        model.forward_features(plain).square().mean().backward()
        again = images.clone().requires_grad_()
        x = model._pos_embed(model.patch_embed(again))
        for start in range(0, 4, chunk):
            x = checkpoint(model.blocks[start : start + chunk], x, use_reentrant=False)
        model.norm(x).square().mean().backward()
        whole = images.clone().requires_grad_()
        checkpoint(model.forward_features, whole, use_reentrant=False).square().mean().backward()
    for each in (again, whole):
        assert each.grad is not None
        torch.testing.assert_close(each.grad, plain.grad)


class Multiscale(VisionTransformer):
    """Collects outputs of blocks in a method of its own."""

    def forward_features(self, x: Tensor) -> Any:
        x, taps = self._pos_embed(self.patch_embed(x)), []
        for block in self.blocks:
            x = block(x)
            taps.append(x)
        return torch.cat(taps, 2)

    def forward(self, x: Tensor) -> Any:
        return self.forward_features(x)


@torch.no_grad()
def test_methods_of_the_user_get_all_tokens() -> None:
    model, images = vit(kind=Multiscale), pictures()
    dense = model(images)
    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        assert model(images).shape == model.forward_features(images).shape == dense.shape
    plain = vit()
    with lp.patch(plain, "topk", SCHEDULE, restore="auto"):
        plain.forward_features = lambda x: VisionTransformer.forward_features(plain, x)
        assert plain.forward_features(images).shape[1] == 17
        del plain.forward_features


@torch.no_grad()
def test_hooks_for_all_modules_see_all_tokens() -> None:
    model, images, counts = vit(), pictures(), []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        if module in set(model.blocks):
            counts.append(output.shape[1])

    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        hook = register_module_forward_hook(see)
        try:
            model(images)
        finally:
            hook.remove()
    assert counts == [17, 17, 17, 17]


@torch.no_grad()
def test_a_part_of_a_batch_is_no_output_of_a_block() -> None:
    model, images = vit(), pictures()
    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks[:2]:
            x = block(x)
        with pytest.raises(UnsupportedModelError, match="block 2"):
            model.blocks[2](x.chunk(2)[0])


@torch.no_grad()
def test_outputs_carry_nothing_along() -> None:
    model, images = vit(), pictures()
    with lp.patch(model, "topk", SCHEDULE, restore="auto"), outputs_of({"last": model.blocks[3]}) as seen:
        model.forward_features(images)
    assert get_state(seen["last"]) is None


@torch.no_grad()
def test_what_enters_a_scaled_model_cannot_be_given_back() -> None:
    model = build_hf("ViTModel").double()
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = model(images).last_hidden_state
    with lp.patch(model, "resize", [9, 0, 0, 0], restore="auto"):
        assert model(images).last_hidden_state.shape == dense.shape
        with pytest.raises(UnsupportedModelError, match=r"hidden_states\[0\]"):
            model(images, output_hidden_states=True)


@torch.no_grad()
def test_copies_and_pickles() -> None:
    model, images = vit(), pictures()
    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        expected = model.forward_intermediates(images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin.forward_intermediates(images), expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_grid_does_not_depend_on_the_batch() -> None:
    model, images = vit(), pictures(3)
    with lp.patch(model, "pomt", SCHEDULE, restore="delta"):
        whole, alone = model.forward_features(images), model.forward_features(images[2:])
    torch.testing.assert_close(whole[2:], alone)


@torch.no_grad()
def test_tokens_that_somebody_changes_are_an_error() -> None:
    model, images = vit(), pictures()
    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        hook = model.blocks[1].register_forward_hook(lambda m, a, out: out.mul_(2))
        with pytest.raises(UnsupportedModelError, match="block 2"):
            model(images)
        hook.remove()
        hook = model.blocks[1].register_forward_hook(lambda m, a, out: out * 2)
        with pytest.raises(UnsupportedModelError, match="block 2"):
            model(images)
        hook.remove()
        model(images)


@torch.no_grad()
def test_a_hook_inside_a_block_is_an_error() -> None:
    model, images = vit(), pictures()
    with lp.patch(model, "topk", SCHEDULE, restore="auto"):
        before = model.blocks[0].mlp.register_forward_hook(lambda *a: None)  # no tokens are gone there
        model(images)
        before.remove()
        hook = model.blocks[2].mlp.fc1.register_forward_hook(lambda *a: None)
        with pytest.raises(UnsupportedModelError, match=r"block 2 .*'mlp\.fc1' \(Linear\)"):
            model(images)
        hook.remove()


@pytest.mark.parametrize("restore", ["nearest", True, 1])
def test_restore_must_be_a_mode(restore: Any) -> None:
    with pytest.raises(ArgumentError, match="restore"):
        lp.patch(vit(), "tome", SCHEDULE, restore=restore)


def test_delta_needs_tokens_of_a_sequence() -> None:
    with pytest.raises(ArgumentError, match=r"`restore` must be 'auto' or 'copy' with resize.*'delta'"):
        lp.patch(vit(), "resize", [7, 0, 0, 0], restore="delta")


def test_an_update_keeps_the_mode() -> None:
    model, images = vit(), pictures()
    with torch.no_grad(), lp.patch(model, "topk", SCHEDULE, restore="auto") as handle:
        handle.update([0, 0, 3, 0])
        assert model.forward_features(images).shape[1] == 17
        handle.update([0, 0, 0, 0])
        assert model.forward_features(images).shape[1] == 17
