"""Pruned models, compared with a reference forward pass in float64."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models import vision_transformer as vit
from torch import Tensor

import lightning_prune as lp
from helpers import reference as naive
from lightning_prune.reduction import RandomDrop

WHERE = {
    "one": [0, 6, 0, 0],
    "two": [5, 0, 7, 0],
    "first": [9, 0, 0, 0],
    "last": [0, 0, 0, 4],
    "all": [3, 3, 3, 3],
    "most": [0, 23, 0, 0],
}


def looped(method: str, prefix: int) -> Callable[..., Tensor]:
    """The reference of a method by loops, for `prune_by_hand`."""
    if method == "pomt":
        return lambda tokens, part, remove: naive.pomt(tokens, *part, remove, prefix)[0]
    return lambda tokens, part, remove: naive.random(tokens, remove, prefix, 0)[0]


@pytest.mark.parametrize("method", ["pomt", "random"])
@pytest.mark.parametrize("where", ["one", "two"])
def test_every_configuration(
    build: Any,
    configuration: str,
    images: Tensor,
    prune_by_hand: Any,
    relative_error: Any,
    leaving: Any,
    method: str,
    where: str,
) -> None:
    model, removed = build(configuration), WHERE[where]
    prefix = model.num_prefix_tokens
    expected = prune_by_hand(model, images, looped(method, prefix), removed)
    with lp.patch(model, method, removed):
        with torch.no_grad():
            found = model(images)
        assert relative_error(found, expected) < 1e-5
        assert leaving(model, images) == lp.Schedule(removed).tokens(25 + prefix)
    model = model.double()
    with lp.patch(model, method, removed), torch.no_grad():
        assert relative_error(model(images.double()), expected) < 1e-10


@pytest.mark.parametrize("method", ["pomt", "random"])
@pytest.mark.parametrize("where", ["first", "last", "all", "most"])
@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip", "res-post"])
def test_every_reducing_block(
    build: Any,
    images: Tensor,
    prune_by_hand: Any,
    relative_error: Any,
    name: str,
    method: str,
    where: str,
) -> None:
    model, removed = build(name).double(), WHERE[where]
    expected = prune_by_hand(model, images, looped(method, model.num_prefix_tokens), removed)
    with lp.patch(model, method, removed), torch.no_grad():
        assert relative_error(model(images.double()), expected) < 1e-10


@pytest.mark.parametrize(
    "name", ["vit", "deit3", "dinov2-registers", "clip", "distilled", "qk-norm", "parallel-things"]
)
@pytest.mark.parametrize("removed", [[0, 6, 0, 0], [5, 0, 7, 0]], ids=["one", "two"])
def test_pruning_equals_masking(build: Any, images: Tensor, relative_error: Any, name: str, removed: list[int]) -> None:
    """The CLS output equals that of the unpatched model with masked tokens in later blocks."""
    model, images = build(name).double(), images.double()
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        there = list(range(x.shape[1]))
        for block, remove in zip(model.blocks, removed, strict=True):
            mask = torch.full((1, 1, 1, x.shape[1]), float("-inf"), dtype=torch.float64)
            mask[..., there] = 0
            x = block(x, attn_mask=mask)
            if remove:
                index = torch.arange(len(there)).double()[:, None]
                there = [there[i] for i in naive.random(index, remove, prefix, 3)[1]]
        expected = model.forward_head(model.norm(x))
        with lp.patch(model, RandomDrop(seed=3), removed):
            assert relative_error(model(images), expected) < 1e-10


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_random_before_block_0(build: Any, images: Tensor, relative_error: Any, name: str) -> None:
    model, images = build(name).double(), images.double()
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        x = torch.stack([naive.random(tokens, 9, prefix, 2)[0] for tokens in x])
        expected = model.forward_head(model.norm(model.blocks(x)))
        with lp.patch(model, RandomDrop(seed=2, site="input"), [9, 0, 0, 0]):
            assert relative_error(model(images), expected) < 1e-10


class ScaledBlock(vit.Block):
    """A user's block with an additional factor between attention and MLP."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        return x + 0.5 * self.ls2(self.mlp(self.norm2(x)))


class RenamedBlock(vit.Block):
    """A user's block that computes the same as timm's."""


class BareBlock(vit.Block):
    """A user's block with other submodules than timm's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        del self.norm2

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(x)


@pytest.mark.parametrize("kind", [ScaledBlock, BareBlock])
@pytest.mark.parametrize("method", ["pomt", "random"])
def test_an_unknown_block_is_not_split(
    build: Any,
    images: Tensor,
    prune_by_hand: Any,
    relative_error: Any,
    leaving: Any,
    caplog: pytest.LogCaptureFixture,
    kind: type,
    method: str,
) -> None:
    model, removed = build("vit", block_fn=kind).double(), [0, 6, 0, 0]
    expected = prune_by_hand(model, images, looped(method, 1), removed)
    with caplog.at_level(logging.INFO, "lightning_prune"), lp.patch(model, method, removed), torch.no_grad():
        assert relative_error(model(images.double()), expected) < 1e-10
        assert leaving(model, images.double()) == (26, 20, 20, 20)
    assert caplog.messages == [f"Block 1 ({kind.__name__}) is cut after its MLP, which still sees all its tokens."]


def test_a_subclass_without_a_forward_is_split(build: Any, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    plain, model = build("vit"), build("vit", block_fn=RenamedBlock)
    with caplog.at_level(logging.INFO, "lightning_prune"):
        lp.patch(plain, "pomt", [0, 6, 0, 0])
        lp.patch(model, "pomt", [0, 6, 0, 0])
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["vit", "diff-attention", "parallel-things", "parallel-scaling"])
@pytest.mark.parametrize("method", ["pomt", "random"])
def test_models_without_fused_attention(
    build: Any, images: Tensor, prune_by_hand: Any, relative_error: Any, name: str, method: str
) -> None:
    model, removed = build(name).double(), [5, 0, 7, 0]
    expected = prune_by_hand(model, images, looped(method, 1), removed)
    modules = [m for m in model.modules() if hasattr(m, "fused_attn")]
    for module in modules[::2]:
        module.fused_attn = False
    flags = [m.fused_attn for m in modules]
    before = model(images.double())
    with lp.patch(model, method, removed), torch.no_grad():
        assert relative_error(model(images.double()), expected) < 1e-10
    assert [m.fused_attn for m in modules] == flags
    assert torch.equal(model(images.double()), before)


@pytest.mark.parametrize("method", ["pomt", "random"])
@pytest.mark.parametrize("name", ["vit", "registers-without-class", "siglip"])
def test_an_image_does_not_depend_on_its_batch(build: Any, draw: Any, name: str, method: str) -> None:
    model, images = build(name), draw(4)
    images[1:] *= torch.tensor([10.0, 0.1, 3.0]).view(3, 1, 1, 1)
    with lp.patch(model, method, [0, 8, 5, 0]), torch.no_grad():
        together = model(images)
        for b in range(4):
            torch.testing.assert_close(model(images[b : b + 1]), together[b : b + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "qk-norm", "diff-attention", "res-post"])
@pytest.mark.parametrize("method", ["pomt", "random"])
def test_bfloat16(build: Any, images: Tensor, relative_error: Any, leaving: Any, name: str, method: str) -> None:
    """Approximately, because bfloat16 ranks near-ties differently; the number of tokens is exact."""
    model = build(name)
    with lp.patch(model, method, [0, 6, 0, 0]), torch.no_grad():
        full = model(images).double()
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(images)
            assert leaving(model, images)[-1] == 20
    model.bfloat16()
    with lp.patch(model, method, [0, 6, 0, 0]), torch.no_grad():
        low = model(images.bfloat16())
        assert leaving(model, images.bfloat16())[-1] == 20
    assert low.dtype == cast.dtype == torch.bfloat16
    assert relative_error(cast, full) < 0.1
    assert relative_error(low, full) < 0.1
