"""Captures the inputs of attention, in fused and in unfused attention modules."""

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
    """A request to an attention module to record its inputs while its block runs.

    Attributes:
        calls: The list to append the inputs to.
        log_sizes: (B, 1, 1, N) to add to the logits of each key, or None.
    """

    calls: list[AttentionInputs]
    log_sizes: Tensor | None


@dataclass(eq=False)
class CaptureSlot:
    """Per-thread slot through which an unfused attention module receives a capture request; empty when idle."""

    request: PerThread[CaptureRequest] = field(default_factory=PerThread)


class Capturing:
    """Captures the attention of one block, as `SDPARecorder` does, but for modules without a fused call."""

    def __init__(self, capture_slot: CaptureSlot, calls: list[AttentionInputs], log_sizes: Tensor | None) -> None:
        self._slot, self._request = capture_slot, CaptureRequest(calls, log_sizes)

    def __enter__(self) -> None:
        self._slot.request.set(self._request)

    def __exit__(self, *_: object) -> None:
        self._slot.request.set(None)


class CapturedAttention(PatchedModule):
    """Mixin for the class of an attention module without a fused call; records the inputs of its attention.

    A subclass for each kind of attention implements `read`.
    """

    _prune_patch: CaptureSlot

    def read(self, x: Tensor) -> AttentionInputs:
        """Query, key and value of the tokens (B, N, C) that enter the attention."""
        raise TypeError(f"{type(self).__name__} must implement `read`.")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the module, and records its inputs if requested."""
        request = self._prune_patch.request.get()
        if request is not None:
            request.calls.append(self.read(x))
            if request.log_sizes is not None:
                kwargs = self.with_key_bias(kwargs, request.log_sizes)
        return super().forward(x, *args, **kwargs)

    def with_key_bias(self, kwargs: dict[str, Any], log_sizes: Tensor) -> dict[str, Any]:
        """The keyword arguments with log-sizes to add to the logits, if the module has an argument for them."""
        raise UnsupportedModelError("This attention cannot weight its keys by their sizes.")


_NOT_FUSED = (
    "The block does not call torch.nn.functional.scaled_dot_product_attention, so its attention cannot be read. Blocks "
    "with their own implementation of attention are not supported."
)


class Bias(NamedTuple):
    """Adapts an additive attention mask for all tokens to the tokens that are left."""

    token_state: TokenState
    num_prefix_tokens: int

    def of(self, mask: Tensor) -> Tensor:
        """See `take_bias`."""
        return self.token_state.adapt_once(
            mask, lambda bias: take_bias(bias, self.token_state.positions, self.num_prefix_tokens)
        )


class SDPARecorder(TorchFunctionMode):
    """Records the inputs of `scaled_dot_product_attention` while one block runs, and may change its additive mask.

    The block runs its own code and its own fused kernel, so its output is bit-identical, and no attention forward of a
    model family has to be copied. The recorded query and key include q/k-norm and rotary embedding. Use it as a context
    manager around one block only, so that it is exited after an exception.

    Args:
        calls: The list to append the inputs to. It belongs to the caller, because `torch.compile` does not trace the
            attributes of a mode.
        log_sizes: (B, 1, 1, N) to add to the logits of each key (proportional attention of ToMe, arXiv 2210.09461,
            section 3), or None for unchanged attention.
        bias: Adapts the mask in models that pass a relative-position bias as a mask; None for an unchanged mask.
    """

    def __init__(self, calls: list[AttentionInputs], log_sizes: Tensor | None = None, bias: Bias | None = None) -> None:
        super().__init__()
        self.calls = calls
        self.log_sizes = log_sizes
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Forwards every call; records attention calls."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attend(_as_keywords(args, kwargs), self.calls, self.log_sizes, self.bias)


class RecordingMask:
    """Records like an `SDPARecorder`, but is passed to the fused call as its `attn_mask`.

    A mode intercepts every function call of a block, which adds 5% to the time of a small block. This object only
    intercepts the call that it is passed to, by `__torch_function__`. `torch.compile` and `torch.export` cannot trace
    it, but there the mode adds no time.

    Args:
        calls: See `SDPARecorder`.
        log_sizes: See `SDPARecorder`.
    """

    def __init__(self, calls: list[AttentionInputs], log_sizes: Tensor | None) -> None:
        self.calls = calls
        self.log_sizes = log_sizes

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the call without this mask, but with `log_sizes`."""
        call = _as_keywords(args, kwargs)
        recorder = call.pop("attn_mask", None)
        if func is not F.scaled_dot_product_attention or not isinstance(recorder, cls):
            raise UnsupportedModelError(_NOT_FUSED)
        return _attend(call, recorder.calls, recorder.log_sizes, None)

    @property
    def dtype(self) -> torch.dtype:
        """Raises, because only unfused attention reads `mask.dtype`."""
        raise UnsupportedModelError(_NOT_FUSED)


def mask_supported(x: Tensor) -> bool:
    """Whether a `RecordingMask` can be used: nothing is being traced, and no other mode overrides functions."""
    return not torch.compiler.is_compiling() and not has_torch_function((x,))


def _as_keywords(args: Any, kwargs: Any) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, args, strict=False)), **(kwargs or {})}


def _attend(call: dict[str, Any], calls: list[AttentionInputs], log_sizes: Tensor | None, bias: Bias | None) -> Any:
    query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
    if call.get("is_causal"):
        raise UnsupportedModelError("Token reduction needs bidirectional attention, got causal attention.")
    if bias is not None and mask is not None:
        mask = bias.of(mask)
    if log_sizes is not None:
        mask = _add_to_mask(mask, log_sizes.to(query.dtype))
    calls.append(AttentionInputs(query, key, value, mask, call.get("scale")))
    return F.scaled_dot_product_attention(**{**call, "attn_mask": mask})


def stack_heads(calls: list[AttentionInputs]) -> AttentionInputs:
    """Concatenates the recorded attention calls of one block along the heads.

    Raises:
        UnsupportedModelError: If the block made no fused attention call, or calls of different shapes.
    """
    if not calls:
        raise UnsupportedModelError(_NOT_FUSED)
    first = calls[0]
    if len(calls) == 1:
        return first
    if any(_signature(call) != _signature(first) for call in calls):
        raise UnsupportedModelError("The block makes several attention calls of different shapes or scales.")
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
