"""Reads the query, key and value of a block's attention through its own fused attention."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.positions import take_bias
from lightning_prune.patching.survivors import Survivors
from lightning_prune.reduction.base import Attention


class Bias(NamedTuple):
    """How the additive mask of attention, made for all tokens, becomes one for those that are left."""

    survivors: Survivors
    prefix_tokens: int

    def of(self, mask: Tensor) -> Tensor:
        """See `take_bias`."""
        return self.survivors.carry(mask, lambda bias: take_bias(bias, self.survivors.positions, self.prefix_tokens))


class AttentionTap(TorchFunctionMode):
    """Watches `scaled_dot_product_attention` while one block runs: records its inputs, may change its additive mask.

    The block runs its own code and its own fused kernel, so its output keeps every bit, and no attention forward of any
    model family is copied. What is recorded has been through q/k-norm and rotary embedding. Enter it with `with`
    around one block only: a mode that outlives an exception would go on watching other models.

    Args:
        calls: Where to record; the caller's own list, because `torch.compile` does not trace a mode's attributes.
        log_sizes: (B, N), added to the logits of every key (proportional attention of ToMe, arXiv 2210.09461,
            section 3), or None to leave attention as it is.
        bias: What to make of a mask, in models that pass a relative-position bias as one; None to leave it as it is.
    """

    def __init__(self, calls: list[Attention], log_sizes: Tensor | None = None, bias: Bias | None = None) -> None:
        super().__init__()
        self.calls = calls
        self.log_sizes = log_sizes
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes every call on; looks at attention only."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
        if call.get("is_causal"):
            raise UnsupportedModelError("Token reduction needs bidirectional attention; this block's is causal.")
        if self.bias is not None and mask is not None:
            mask = self.bias.of(mask)
        if self.log_sizes is not None:
            mask = _add_to_mask(mask, self.log_sizes[:, None, None, :].to(query.dtype))
        call["attn_mask"] = mask
        self.calls.append(Attention(query, key, value, mask, call.get("scale")))
        return func(**call)


def recorded_attention(calls: list[Attention]) -> Attention:
    """What a tap recorded of one block; the heads of several attention calls of the block stand side by side.

    Raises:
        UnsupportedModelError: If the block made no fused attention call, or calls that do not go together.
    """
    if not calls:
        raise UnsupportedModelError(
            "The block made no call of torch.nn.functional.scaled_dot_product_attention, so its attention cannot "
            "be read. Blocks with an attention of their own making are not supported."
        )
    first = calls[0]
    if len(calls) == 1:
        return first
    if any(_form(call) != _form(first) for call in calls):
        raise UnsupportedModelError("The block makes several attention calls of different form.")
    query, key, value = (torch.cat(parts, dim=1) for parts in list(zip(*calls, strict=True))[:3])
    masks = [c.mask.expand(*c.query.shape[:2], *c.mask.shape[-2:]) for c in calls if c.mask is not None]
    return Attention(query, key, value, torch.cat(masks, dim=1) if masks else None, first.scale)


def _form(call: Attention) -> tuple[Any, ...]:
    mask = call.mask
    return call.query.shape, call.scale, *((None, None) if mask is None else (mask.dtype, mask.shape))


def _add_to_mask(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias
