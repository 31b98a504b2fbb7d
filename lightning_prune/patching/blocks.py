"""The two halves of each kind of block: attention with its residual, and MLP with its residual."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Halves(NamedTuple):
    """How to run a block in two parts: `mlp(block, attention(block, x, *args, **kwargs))` is `block(x, ...)`."""

    attention: Callable[..., Tensor]
    mlp: Callable[[Any, Tensor], Tensor]


def _pre_norm_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), *args, **kwargs)))


def _pre_norm_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _post_norm_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(block.norm1(block.attn(x, *args, **kwargs)))


def _post_norm_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _parallel_attention(block: Any, x: Tensor) -> Tensor:
    return x + torch.stack([attn(x) for attn in block.attns]).sum(dim=0)


def _parallel_mlp(block: Any, x: Tensor) -> Tensor:
    return x + torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)


PRE_NORM = Halves(_pre_norm_attention, _pre_norm_mlp)
POST_NORM = Halves(_post_norm_attention, _post_norm_mlp)
PARALLEL = Halves(_parallel_attention, _parallel_mlp)


def halves_agree(block: nn.Module, halves: Halves, tokens: int, channels: int) -> bool:
    """Whether the two halves reproduce the block's own forward to the bit, on random tokens.

    Runs in evaluation mode and without autograd; the training flags are put back and no generator is touched.

    Args:
        block: The block, unpatched.
        halves: The recipe to check.
        tokens: Tokens to try it on.
        channels: C.
    """
    like = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(1, tokens, channels, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = noise.to(device=like.device, dtype=like.dtype)
    with torch.no_grad(), evaluating(block):
        try:
            return torch.equal(halves.mlp(block, halves.attention(block, x)), block.forward(x))  # without its hooks
        except (AttributeError, TypeError, RuntimeError):
            return False  # a block of the same class family, but built of other parts


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule then gets back the training flag that it had."""
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag
