"""POMT in every family of timm, compared with a reference forward pass in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.cait import TalkingHeadAttn
from timm.models.convit import MHSA
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

import lightning_prune as lp
from helpers import reference as naive

from .sweep import coverage

SMALL = {"embed_dim": 32, "num_heads": 4, "depth": 4, "num_classes": 5}


def beit(**options: Any) -> nn.Module:
    return coverage.stir(Beit(img_size=20, patch_size=4, **SMALL, **options))


def naflex(**options: Any) -> nn.Module:
    shape = {key: value for key, value in SMALL.items() if key != "num_classes"}
    return coverage.stir(NaFlexVit(NaFlexVitCfg(patch_size=16, pos_embed_grid_size=(5, 5), **shape, **options), 3, 5))


def named(name: str, **more: Any) -> Any:
    return lambda: coverage.stir(coverage.build_small(name, **more))


MODELS: dict[str, Any] = {
    "eva02": named("eva02_tiny_patch14_224"),
    "eva-without-rope": named("eva_giant_patch14_224"),
    "eva-post-norm": named("eva02_enormous_patch14_clip_224"),
    "perception-encoder": named("vit_pe_core_tiny_patch16_384"),
    "dinov3": named("vit_small_patch16_dinov3"),
    "grouped-queries": named("vit_5b_patch16_sapiens2", num_kv_heads=1),
    "rope-mixed": named("vit_base_patch16_rope_mixed_224"),
    "rope-dynamic-size": named("vit_small_patch16_dinov3", dynamic_img_size=True),
    "naflex": named("naflexvit_base_patch16_gap"),
    "naflex-rope": lambda: naflex(rope_type="axial", attn_type="rope"),
    "naflex-rope-mixed": lambda: naflex(rope_type="mixed", attn_type="rope"),
    "beit-own-bias": named("beitv2_base_patch16_224"),
    "beit-shared-bias": lambda: beit(use_shared_rel_pos_bias=True),
    "beit-both": lambda: beit(use_shared_rel_pos_bias=True, use_rel_pos_bias=True, init_values=0.5),
    "beit-without-bias": lambda: beit(use_abs_pos_emb=True),
    "relpos": named("vit_relpos_small_patch16_224"),
    "relpos-shared": named("vit_srelpos_small_patch16_224"),
    "relpos-res-post": named("vit_relpos_base_patch16_clsgap_224"),
    "relpos-bias-table": named("vit_relpos_small_patch16_224", rel_pos_type="bias", class_token=True),
    "cait": named("cait_xxs24_224"),
    "convit": named("convit_tiny", local_up_to_layer=1),
}


class Zero(nn.Module):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


@contextmanager
def silenced(block: nn.Module, *names: str) -> Iterator[None]:
    """A block without some of its parts, which add zero to the residual stream."""
    parts = {name: getattr(block, name) for name in names}
    for name in names:
        setattr(block, name, Zero())
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(block, name, part)


def neutral_rows(rope: Tensor, places: list[int]) -> Tensor:
    """Rows of concatenated sines and cosines, (N, D) or (H, N, D), by position; no rotation for -1."""
    half = rope.shape[-1] // 2
    still = torch.cat((torch.zeros(half), torch.ones(half))).to(rope).expand(*rope.shape[:-2], -1)
    rows = torch.stack([still if place < 0 else rope[..., place, :] for place in places], dim=-2)
    return rows[None] if rope.ndim == 3 else rows[None, None]


def bias_by_hand(bias: Tensor, places: list[int], prefix: int) -> Tensor:
    """(1, H, N, N) or (H, N, N) -> (1, H, K, K), entry by entry; the mean over patch tokens for -1."""
    count = bias.shape[-1]
    bias = bias.reshape(1, -1, count, count)
    patches = range(prefix, count)
    found = bias.new_zeros(1, bias.shape[1], len(places), len(places))
    for row, i in enumerate(places):
        for column, j in enumerate(places):
            over = [bias[..., a, b] for a in (patches if i < 0 else [i]) for b in (patches if j < 0 else [j])]
            found[..., row, column] = torch.stack(over).mean(dim=0)
    return found


def attention_by_hand(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A (H, N, N) and V (H, N, D) of a module without fused attention, for one image."""
    query, key, value = attn.qkv(x)[0].reshape(x.shape[1], 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    logits = query @ key.transpose(-2, -1) * attn.scale
    if isinstance(attn, TalkingHeadAttn):
        logits = attn.proj_l(logits.permute(1, 2, 0)).permute(2, 0, 1)
    return logits.softmax(-1), value


@torch.no_grad()
def reference(model: Any, image: Tensor, removed: list[int]) -> Tensor:
    """The output for one image, with the model's own unpatched blocks."""
    prefix = 0 if type(model).__name__ == "Cait" else model.num_prefix_tokens
    entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        b.register_forward_pre_hook(lambda _, args, kwargs: entered.append((args, kwargs)), with_kwargs=True)
        for b in model.blocks
    ]
    model(image)
    for hook in hooks:
        hook.remove()
    first = getattr(model, "local_up_to_layer", 0)
    x = entered[first][0][0]
    places = list(range(x.shape[1]))
    original = F.scaled_dot_product_attention
    for index, block in enumerate(model.blocks):
        if index < first:
            continue
        kwargs = dict(entered[index][1])
        if kwargs.get("rope") is not None and len(places) < entered[index][0][0].shape[1]:
            kwargs["rope"] = neutral_rows(kwargs["rope"], [p if p < 0 else p - prefix for p in places[prefix:]])
        seen: list[tuple[Tensor, ...]] = []

        def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
            if attn_mask is not None and attn_mask.shape[-1] != key.shape[-2]:
                attn_mask = bias_by_hand(attn_mask, places, prefix)  # noqa: B023
            mask = torch.zeros(()).double() if attn_mask is None else attn_mask.reshape(-1, *attn_mask.shape[-2:])
            seen.append((query[0], key[0], value[0], mask))  # noqa: B023
            return original(query, key, value, attn_mask=attn_mask, **more)

        F.scaled_dot_product_attention = spy
        try:
            if not removed[index]:
                x = block(x, **kwargs)
                continue
            with silenced(block, "norm2", "mlp"):
                middle = block(x, **kwargs)
            if isinstance(block.attn, TalkingHeadAttn | MHSA):
                shares, value = attention_by_hand(block.attn, block.norm1(x))
            else:
                query, key, value, mask = seen[0]
                shares = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + mask).softmax(-1)
            left, kept = naive.pomt(middle[0], value, value, value, removed[index], prefix, shares.tolist())
            places = [-1 if k < 0 else places[k] for k in kept]
            with silenced(block, "norm1", "attn"):
                x = block(left[None].to(middle.dtype), **kwargs)
        finally:
            F.scaled_dot_product_attention = original
    hook = model.blocks[-1].register_forward_hook(lambda *_: x)
    try:
        return model(image)
    finally:
        hook.remove()


@pytest.mark.parametrize("removed", [[0, 6, 0, 0], [0, 5, 4, 0], [0, 7, 0, 5]], ids=["one", "next", "two"])
@pytest.mark.parametrize("name", MODELS)
def test_pomt(name: str, removed: list[int], relative_error: Any) -> None:
    model = MODELS[name]().double()
    images = torch.randn(2, 3, *coverage.image_size(model), generator=torch.Generator().manual_seed(1)).double()
    expected = torch.cat([reference(model, image[None], removed) for image in images])
    with torch.no_grad():
        dense = model(images)
        with lp.patch(model, "pomt", removed):
            found = model(images)
    assert relative_error(found, expected) < 1e-10
    assert relative_error(dense, expected) > 1e-6
