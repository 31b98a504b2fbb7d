"""The patched block: a block that reduces its tokens between attention and MLP."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune._utils.device import device_name
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.patching.attention_capture import CaptureSlot, RecordingMask, mask_supported, stack_heads
from lightning_prune.patching.block_split import AttnMlpSplit
from lightning_prune.patching.class_swap import PatchedModule
from lightning_prune.patching.models.base import ModelAdapter, Setting
from lightning_prune.patching.token_state import PerThread, TokenState, attach_state, get_state, next_token_state
from lightning_prune.reduction.base import AttentionInputs, Reduction, TokenSequence
from lightning_prune.reduction.functional import take_tokens
from lightning_prune.schedule import Rate


def warn_elsewhere(made_on: MeasurementSource, x: Tensor) -> None:
    """Warns if a schedule was made on another device, batch size or token count than those of tokens (B, N, C)."""
    here = {"device": device_name(x.device), "batch_size": x.shape[0], "dense_tokens": x.shape[1]}
    differences = made_on.differences(**here)
    if differences:
        warnings.warn(
            f"The schedule was made elsewhere: {'; '.join(differences)}. It is used as it is, but its latency was "
            "measured there.",
            stacklevel=2,
        )


@dataclass(eq=False)
class InputCapture:
    """Hands the images of the forward pass that is under way to a reduction that reads them."""

    pixels: PerThread[Tensor] = field(default_factory=PerThread)

    def take(self, tokens: Tensor) -> Tensor:
        """The images that these tokens (B, N, C) were made of.

        From now on they travel with the tokens, so that no batch outlives its forward pass and the backward after it,
        in which a checkpointed block asks for them again.

        Raises:
            UnsupportedModelError: If they were not seen.
        """
        pixels = get_state(tokens)
        if pixels is None:  # not a block that backward runs again
            pixels = self.pixels.get()
            self.pixels.set(None)
        if not isinstance(pixels, Tensor):
            raise UnsupportedModelError(
                "The images that these tokens were made of were not seen. Run the whole model, and compile it as a "
                "whole or not at all."
            )
        attach_state(tokens, pixels)
        return pixels


@dataclass(eq=False)
class BlockPatch:
    """What one patched block does. It keeps nothing of a forward pass: that travels with the tokens."""

    index: int
    reduction: Reduction
    remove: int | Rate
    num_prefix_tokens: int
    has_class_token: bool
    adapter: ModelAdapter
    attn_mlp_split: AttnMlpSplit | None = None
    has_predecessor: bool = False  # whether a patched block comes before this one
    pixels: InputCapture | None = None
    tracks_state: bool = False  # whether later blocks must know who is left
    tracks_positions: bool = True  # and where each of them stood
    weighs_keys: bool = False  # whether their sizes weigh the attention of later blocks
    is_adaptive: bool = False  # whether the images decide here how many tokens go
    traces: bool = False  # whether it must be known which token each of block 0 went into
    restores: bool = False  # whether each token stands again, after this block, where those it is made of stood
    fused_settings: list[Setting] = field(default_factory=list)  # what was changed to have fused attention in the block
    mask_passthrough: Callable[..., Any] | None = (
        None  # the attention's forward, if an `attn_mask` reaches its fused call
    )
    capture_slot: CaptureSlot | None = None  # of attention modules that make no fused call
    made_on: MeasurementSource | None = None  # where the schedule was made; compared with the first batch

    def removes(self, tokens: int) -> int:
        """How many tokens go, of `tokens` that enter the block."""
        if isinstance(self.remove, int):
            return self.remove
        return self.remove.removes(tokens, self.num_prefix_tokens)

    def check(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what a reducing block cannot honour; warns where the schedule was made elsewhere.

        Raises:
            ArgumentError: If an attention mask for all tokens came.
            UnsupportedModelError: If attention is to be causal.
        """
        self.adapter.check_call(args, kwargs)
        if self.made_on is not None and not torch.compiler.is_compiling():
            made_on, self.made_on = self.made_on, None
            warn_elsewhere(made_on, x)

    def takes_mask(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a mask can be handed to the block's attention: it runs what is known, and no mask came."""
        if self.mask_passthrough is None or args or kwargs.get("attn_mask") is not None:
            return False
        return type(block.attn).forward is self.mask_passthrough and "forward" not in block.attn.__dict__

    def arriving_state(self, x: Tensor) -> TokenState | None:
        """State of the tokens that the blocks before this one left; None where all are left, or none is tracked.

        Raises:
            UnsupportedModelError: If that cannot be said of the tokens that arrive.
        """
        if not (self.has_predecessor and self.tracks_state):
            return None
        left = get_state(x)
        if not isinstance(left, CarriedState) or (left.token_state and left.token_state.num_tokens != x.shape[1]):
            raise UnsupportedModelError(
                f"The tokens that enter block {self.index} are not those that left the block before: something between "
                "them, such as a hook that returns other tokens, lost what belongs to them (where each stood)."
            )
        return left.token_state


class CarriedState(NamedTuple):
    """What a block that keeps account leaves with its tokens."""

    token_state: TokenState | None


class PatchedBlock(PatchedModule):
    """Mixin over a block's class. Its `forward` reduces; everything else is the block's own."""

    _prune_patch: BlockPatch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's own computation with the reduction at its place."""
        patch = self._prune_patch
        reduction, adapter, prefix = patch.reduction, patch.adapter, patch.num_prefix_tokens
        arrived = patch.arriving_state(x)
        remove = patch.removes(x.shape[1])
        reduces = remove > 0 or patch.is_adaptive
        if reduces:
            patch.check(x, args, kwargs)
        if reduces and reduction.site == "input":
            pixels = patch.pixels.take(x) if patch.pixels is not None else None
            x, arrived = _reduce(patch, TokenSequence(x, prefix, patch.has_class_token, pixels=pixels), remove, arrived)
            reduces = False
        if arrived is not None:
            args, kwargs = adapter.adapt_position_inputs(args, kwargs, arrived, prefix)
        log_sizes = arrived.log_sizes if arrived is not None else None
        reads = reduces and "attention" in reduction.reads
        attn_mlp_split = patch.attn_mlp_split if reduces else None
        calls: list[AttentionInputs] = []
        tap: AbstractContextManager[Any] = nullcontext()
        if not reads and log_sizes is not None and patch.takes_mask(self, args, kwargs):
            kwargs, log_sizes = {**kwargs, "attn_mask": log_sizes}, None  # weighed by attention itself: no need to look
        elif reads and patch.takes_mask(self, args, kwargs) and mask_supported(x):
            kwargs = {**kwargs, "attn_mask": RecordingMask(calls, log_sizes)}
        elif reads or log_sizes is not None or (arrived is not None and adapter.requires_recorder):
            tap = adapter.recorder(calls, log_sizes, arrived, prefix, patch.capture_slot)
        with tap:
            if attn_mlp_split is None:
                after = super().forward(x, *args, **kwargs)
            else:
                after = attn_mlp_split.attention(self, x, *args, **kwargs)
        if log_sizes is not None and not calls:
            stack_heads(calls)  # raises: nothing was weighed
        if reduces:
            known = arrived.sizes if arrived is not None else None
            attention = stack_heads(calls) if reads else None
            sequence = TokenSequence(after, prefix, patch.has_class_token, attention, known, x)
            after, arrived = _reduce(patch, sequence, remove, arrived)
            del attention, sequence
            calls.clear()  # query, key and value of all tokens need not outlive the reduction
            if attn_mlp_split is not None:
                after = attn_mlp_split.mlp(self, after)
        if patch.restores and arrived is not None and arrived.sources is not None:
            return take_tokens(after, arrived.sources)
        if patch.tracks_state:
            attach_state(after, CarriedState(arrived))
        return after


class CaptureInput(PatchedModule):
    """Mixin over the class of the module that receives the images: remembers them for this forward pass."""

    _prune_patch: InputCapture

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own computation."""
        self._prune_patch.pixels.set(x)
        return super().forward(x, *args, **kwargs)


def _reduce(
    patch: BlockPatch, sequence: TokenSequence, remove: int, arrived: TokenState | None
) -> tuple[Tensor, TokenState | None]:
    count = sequence.tokens.shape[1]
    max_removed = patch.reduction.max_removed(count, patch.num_prefix_tokens)
    if remove > max_removed:
        raise ScheduleError(too_many(patch.index, count, remove, max_removed, patch.reduction.name))
    reduced = patch.reduction.reduce(sequence._replace(trace=True) if patch.traces else sequence, remove)
    if patch.traces and reduced.sources is None:
        # Positions tell of one fused token at most; where others went cannot be guessed, nor checked without a sync.
        raise ArgumentError(
            f"{patch.reduction.name} says that it `merges`, and this model pools over its patch tokens, so it must say "
            "where each token went: return `ReductionOutput.sources` where `TokenSequence.trace` asks for them."
        )
    if not patch.tracks_state:
        return reduced.tokens, None
    return reduced.tokens, next_token_state(arrived, reduced, patch.tracks_positions, patch.weighs_keys)


def too_many(block: int, tokens: int, remove: int, max_removed: int, method: str) -> str:
    """The message of a `ScheduleError`, at patch time or, where the token count depends on the image, in forward."""
    return (
        f"Block {block} is asked to remove {remove} tokens, but of the {tokens} that enter it {method} can remove at "
        f"most {max_removed}."
    )
