"""Capturing what attention computes from, in fused and in unfused attention modules."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, has_torch_function

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.class_swap import PatchedModule
from lightning_prune.patching.position_terms import take_bias
from lightning_prune.patching.token_state import PerThread, TokenState
from lightning_prune.reduction.base import AttentionInputs


class CaptureRequest(NamedTuple):
    """What an attention module records while its block runs.

    Attributes:
        calls: Where to record.
        log_sizes: (B, 1, 1, N) to be added to the logits of every key, or None.
    """

    calls: list[AttentionInputs]
    log_sizes: Tensor | None


@dataclass(eq=False)
class CaptureSlot:
    """Per-thread slot through which an unfused attention module receives a capture request; empty when idle."""

    request: PerThread[CaptureRequest] = field(default_factory=PerThread)


class Capturing:
    """Captures one block's attention: what `SDPARecorder` does, for modules without a fused call."""

    def __init__(self, capture_slot: CaptureSlot, calls: list[AttentionInputs], log_sizes: Tensor | None) -> None:
        self._slot, self._request = capture_slot, CaptureRequest(calls, log_sizes)

    def __enter__(self) -> None:
        self._slot.request.set(self._request)

    def __exit__(self, *_: object) -> None:
        self._slot.request.set(None)


class CapturedAttention(PatchedModule):
    """Mixin over the class of an attention module without a fused call: records what it computes from.

    A subclass for each kind says how to read query, key and value from what goes into it.
    """

    _prune_patch: CaptureSlot

    def read(self, x: Tensor) -> AttentionInputs:
        """Query, key and value for the tokens (B, N, C) that go into the attention."""
        raise TypeError(f"{type(self).__name__} does not say how its attention is read.")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own computation."""
        request = self._prune_patch.request.get()
        if request is not None:
            request.calls.append(self.read(x))
            if request.log_sizes is not None:
                kwargs = self.with_key_bias(kwargs, request.log_sizes)
        return super().forward(x, *args, **kwargs)

    def with_key_bias(self, kwargs: dict[str, Any], log_sizes: Tensor) -> dict[str, Any]:
        """The call with log-sizes added to the logits, where the module has an argument for that."""
        raise UnsupportedModelError("This attention cannot weigh its keys by their sizes.")


_NOT_FUSED = (
    "The block made no call of torch.nn.functional.scaled_dot_product_attention, so its attention cannot be read. "
    "Blocks with an attention of their own making are not supported."
)


class Bias(NamedTuple):
    """How the additive mask of attention, made for all tokens, becomes one for those that are left."""

    token_state: TokenState
    num_prefix_tokens: int

    def of(self, mask: Tensor) -> Tensor:
        """See `take_bias`."""
        return self.token_state.adapt_once(
            mask, lambda bias: take_bias(bias, self.token_state.positions, self.num_prefix_tokens)
        )


class SDPARecorder(TorchFunctionMode):
    """Watches `scaled_dot_product_attention` while one block runs: records its inputs, may change its additive mask.

    The block runs its own code and its own fused kernel, so its output keeps every bit, and no attention forward of any
    model family is copied. What is recorded has been through q/k-norm and rotary embedding. Enter it with `with`
    around one block only: a mode that outlives an exception would go on watching other models.

    Args:
        calls: Where to record; the caller's own list, because `torch.compile` does not trace a mode's attributes.
        log_sizes: (B, 1, 1, N), added to the logits of every key (proportional attention of ToMe, arXiv 2210.09461,
            section 3), or None to leave attention as it is.
        bias: What to make of a mask, in models that pass a relative-position bias as one; None to leave it as it is.
    """

    def __init__(self, calls: list[AttentionInputs], log_sizes: Tensor | None = None, bias: Bias | None = None) -> None:
        super().__init__()
        self.calls = calls
        self.log_sizes = log_sizes
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes every call on; looks at attention only."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attend(_as_keywords(args, kwargs), self.calls, self.log_sizes, self.bias)


class RecordingMask:
    """Does what an `SDPARecorder` does as the `attn_mask` of the one fused call that it is handed on to.

    Under a mode every function call of a block passes through Python, which costs a small block a twentieth of its
    time. A mask that is no tensor is asked by its one call only. `torch.compile` and `torch.export` do not trace it;
    there the mode costs nothing.

    Args:
        calls: Where to record.
        log_sizes: As of `SDPARecorder`.
    """

    def __init__(self, calls: list[AttentionInputs], log_sizes: Tensor | None) -> None:
        self.calls = calls
        self.log_sizes = log_sizes

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call without this mask, and with the weights of the keys."""
        call = _as_keywords(args, kwargs)
        asking = call.pop("attn_mask", None)
        if func is not F.scaled_dot_product_attention or not isinstance(asking, cls):
            raise UnsupportedModelError(_NOT_FUSED)
        return _attend(call, asking.calls, asking.log_sizes, None)

    @property
    def dtype(self) -> torch.dtype:
        """Unfused attention reads `mask.dtype` first; raise here."""
        raise UnsupportedModelError(_NOT_FUSED)


def mask_supported(x: Tensor) -> bool:
    """Whether a `RecordingMask` works here: nothing is being traced, and no other mode overrides functions."""
    return not torch.compiler.is_compiling() and not has_torch_function((x,))


def _as_keywords(args: Any, kwargs: Any) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, args, strict=False)), **(kwargs or {})}


def _attend(call: dict[str, Any], calls: list[AttentionInputs], log_sizes: Tensor | None, bias: Bias | None) -> Any:
    query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
    if call.get("is_causal"):
        raise UnsupportedModelError("Token reduction needs bidirectional attention; this block's is causal.")
    if bias is not None and mask is not None:
        mask = bias.of(mask)
    if log_sizes is not None:
        mask = _add_to_mask(mask, log_sizes.to(query.dtype))
    calls.append(AttentionInputs(query, key, value, mask, call.get("scale")))
    return F.scaled_dot_product_attention(**{**call, "attn_mask": mask})


def stack_heads(calls: list[AttentionInputs]) -> AttentionInputs:
    """What a tap recorded of one block; the heads of several attention calls of the block stand side by side.

    Raises:
        UnsupportedModelError: If the block made no fused attention call, or calls that do not go together.
    """
    if not calls:
        raise UnsupportedModelError(_NOT_FUSED)
    first = calls[0]
    if len(calls) == 1:
        return first
    if any(_signature(call) != _signature(first) for call in calls):
        raise UnsupportedModelError("The block makes several attention calls of different form.")
    query, key, value = (torch.cat(parts, dim=1) for parts in list(zip(*calls, strict=True))[:3])
    masks = [c.mask.expand(*c.query.shape[:2], *c.mask.shape[-2:]) for c in calls if c.mask is not None]
    return AttentionInputs(query, key, value, torch.cat(masks, dim=1) if masks else None, first.scale)


def _signature(call: AttentionInputs) -> tuple[Any, ...]:
    mask = call.mask
    return call.query.shape, call.scale, *((None, None) if mask is None else (mask.dtype, mask.shape))


def _add_to_mask(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias
