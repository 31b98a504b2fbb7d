"""A small model of every kind of timm transformer, with a reference forward pass."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from timm.layers.diff_attention import DiffAttention
from timm.models import vision_transformer as vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from helpers.data import noise_images
from helpers.models import disturb, tiny_vit

SIZE, DEPTH = 20, 4  # 25 patch tokens

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit3": {"no_embed_class": True, "init_values": 0.5},
    "distilled": {"kind": VisionTransformerDistilled},
    "dinov2": {"init_values": 0.5, "mlp_layer": SwiGLUPacked},
    "dinov2-registers": {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True},
    "registers-without-class": {"class_token": False, "reg_tokens": 4, "global_pool": "avg"},
    "one-register": {"reg_tokens": 1},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "siglip": {"class_token": False, "global_pool": "map"},
    "pool-avg": {"global_pool": "avg"},
    "pool-avg-prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "pool-avgmax": {"global_pool": "avgmax"},
    "pool-max": {"class_token": False, "global_pool": "max", "fc_norm": False},
    "pool-map-class": {"global_pool": "map"},
    "pool-prr": {"global_pool": "prr"},
    "no-pool": {"global_pool": ""},
    "no-prefix": {"class_token": False, "global_pool": "avg"},
    "features": {"num_classes": 0},
    "qk-norm": {"qk_norm": True},
    "scale-norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "layer-scale": {"init_values": 0.5},
    "swiglu": {"mlp_layer": SwiGLU},
    "one-head": {"num_heads": 1},
    "no-bias": {"qkv_bias": False, "proj_bias": False},
    "no-positions": {"pos_embed": "none"},
    "dynamic-size": {"dynamic_img_size": True},
    "patch-drop": {"patch_drop_rate": 0.25, "drop_path_rate": 0.2, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1},
    "diff-attention": {"attn_layer": "diff"},
    "res-post": {"block_fn": vit.ResPostBlock, "init_values": 0.5},
    "parallel-things": {"block_fn": vit.ParallelThingsBlock, "init_values": 0.5},
    "parallel-scaling": {"block_fn": vit.ParallelScalingBlock, "init_values": 0.5},
    "diff-parallel-scaling": {"block_fn": vit.DiffParallelScalingBlock},
}


def build_vit(name: str = "vit", seed: int = 0, **more: Any) -> VisionTransformer:
    """A model with non-uniform attention and random biases and scales."""
    options = {"img_size": SIZE, "patch_size": 4, "depth": DEPTH, "num_heads": 4, "num_classes": 7}
    model: VisionTransformer = disturb(tiny_vit(seed=None, **options | CONFIGURATIONS[name] | more), seed)
    return model


def draw_images(batch: int = 2, size: int = SIZE, seed: int = 0) -> Tensor:
    return noise_images(batch, size=size, seed=seed)


Part = tuple[Tensor, Tensor, Tensor]  # query, key, value (heads, N, D) of one image


def read_attention(attn: nn.Module, x: Tensor) -> Part:
    """Query, key and value of one image, by the module's projections."""
    tokens, heads = x.shape[1], attn.num_heads
    if isinstance(attn, DiffAttention):
        query, key, value = attn.qkv(x)[0].chunk(3, dim=-1)
        query = attn.q_norm(query.reshape(tokens, 2 * heads, -1).transpose(0, 1))
        key = attn.k_norm(key.reshape(tokens, 2 * heads, -1).transpose(0, 1))
        value = value.reshape(tokens, heads, -1).transpose(0, 1).repeat_interleave(2, dim=0)
        return query, key, value
    query, key, value = attn.qkv(x)[0].reshape(tokens, 3, heads, -1).permute(1, 2, 0, 3)
    return attn.q_norm(query), attn.k_norm(key), value


def read_parallel_scaling(block: nn.Module, x: Tensor) -> Part:
    tokens, twice = x.shape[1], 2 if isinstance(block, vit.DiffParallelScalingBlock) else 1
    _, query, key, value = torch.split(block.in_proj(block.in_norm(x))[0], block.in_split, dim=-1)
    query = block.q_norm(query.reshape(tokens, twice * block.num_heads, -1).transpose(0, 1))
    key = block.k_norm(key.reshape(tokens, twice * block.num_heads, -1).transpose(0, 1))
    value = value.reshape(tokens, block.num_heads, -1).transpose(0, 1).repeat_interleave(twice, dim=0)
    return query, key, value


def by_hand(block: nn.Module, x: Tensor, reduce: Callable[[Tensor, Part], Tensor]) -> Tensor:
    """Runs one block on one image, with the reduction between attention and MLP if the block can be split."""
    if type(block) is vit.Block:
        part = read_attention(block.attn, block.norm1(x))
        x = reduce(x + block.ls1(block.attn(block.norm1(x))), part)
        return x + block.ls2(block.mlp(block.norm2(x)))
    if type(block) is vit.ResPostBlock:
        part = read_attention(block.attn, x)
        x = reduce(x + block.norm1(block.attn(x)), part)
        return x + block.norm2(block.mlp(x))
    if type(block) is vit.ParallelThingsBlock:
        parts = [read_attention(one.attn, one.norm(x)) for one in block.attns]
        x = x + sum(one.ls(one.attn(one.norm(x))) for one in block.attns)
        x = reduce(x, tuple(torch.cat(each) for each in zip(*parts, strict=True)))
        return x + sum(one.ls(one.mlp(one.norm(x))) for one in block.ffns)
    if type(block) in (vit.ParallelScalingBlock, vit.DiffParallelScalingBlock):
        return reduce(block(x), read_parallel_scaling(block, x))
    assert isinstance(block, vit.Block), "a class of the test's own, cut after the whole block"
    return reduce(block(x), read_attention(block.attn, block.norm1(x)))


@torch.no_grad()
def reference(
    model: VisionTransformer, images: Tensor, method: Callable[[Tensor, Part, int], Tensor], removed: list[int]
) -> Tensor:
    """The pruned output in float64, image by image; `method(tokens, (q, k, v), R)` reduces (N, C) tokens."""
    model = copy.deepcopy(model).double()
    outputs = []
    for image in images.double():
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
        for block, remove in zip(model.blocks, removed, strict=True):
            if remove:
                x = by_hand(block, x, lambda x, part, remove=remove: method(x[0], part, remove)[None])
            else:
                x = block(x)
        outputs.append(model.forward_head(model.norm(x)))
    return torch.cat(outputs)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest value."""
    assert found.shape == expected.shape
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def tokens_leaving(model: VisionTransformer, images: Tensor) -> tuple[int, ...]:
    """Records the number of tokens that leave each block in a forward pass."""
    counts: list[int] = []
    hooks = [b.register_forward_hook(lambda *call: counts.append(call[-1].shape[1])) for b in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return tuple(counts)


@pytest.fixture(scope="session")
def build() -> Callable[..., VisionTransformer]:
    return build_vit


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tensor]:
    return draw_images


@pytest.fixture(scope="session")
def prune_by_hand() -> Callable[..., Tensor]:
    return reference


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    return error


@pytest.fixture(scope="session")
def leaving() -> Callable[[VisionTransformer, Tensor], tuple[int, ...]]:
    return tokens_leaving


@pytest.fixture(params=CONFIGURATIONS)
def configuration(request: pytest.FixtureRequest) -> str:
    """Parametrizes over the names of all configurations."""
    name: str = request.param
    return name


@pytest.fixture
def images() -> Tensor:
    return draw_images()


@pytest.fixture
def no_mode_left() -> Iterator[None]:
    """Fails a test that leaves a torch function mode active."""
    yield
    assert torch.overrides._get_current_function_mode_stack() == []
