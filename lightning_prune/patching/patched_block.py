"""The patched block, which removes tokens between its attention and its MLP."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune._utils.device import device_name
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.patching.attention_capture import CaptureSlot, RecordingMask, mask_supported, stack_heads
from lightning_prune.patching.block_split import AttnMlpSplit
from lightning_prune.patching.class_swap import PatchedModule, Setting
from lightning_prune.patching.exact_tail import ExactTail
from lightning_prune.patching.input_resize import InputResize, resize_of
from lightning_prune.patching.models.base import ModelAdapter, VisionTransformer
from lightning_prune.patching.restored_tokens import DeltaCut, cut_of, restored
from lightning_prune.patching.token_readers import TokenReaders, rule_for
from lightning_prune.patching.token_state import PerThread, TokenState, attach_state, get_state, next_token_state
from lightning_prune.reduction.base import AttentionInputs, Reduction, TokenSequence
from lightning_prune.schedule import Rate


@dataclass(eq=False)
class InputCapture:
    """Passes the images of the current forward pass to a reduction that reads them."""

    pixels: PerThread[Tensor] = field(default_factory=PerThread)

    def take(self, tokens: Tensor) -> Tensor:
        """The images of these tokens (B, N, C).

        From then on they are attached to the tokens, so that they are freed after the forward pass and its backward, in
        which a checkpointed block needs them again.

        Raises:
            UnsupportedModelError: If no images were captured.
        """
        pixels = get_state(tokens)
        if pixels is None:  # unless backward runs a checkpointed block again
            pixels = self.pixels.get()
            self.pixels.set(None)
        if not isinstance(pixels, Tensor):
            raise UnsupportedModelError(
                "The images of these tokens were not captured. Run the whole model, and compile all of it or none."
            )
        attach_state(tokens, pixels)
        return pixels


@dataclass(eq=False)
class BlockPatch:
    """Settings of one patched block. State of a forward pass is attached to the tokens and not stored here."""

    index: int
    depth: int  # number of blocks of the model
    reduction: Reduction | None  # None if the block has the exact tail alone
    remove: int | Rate
    num_prefix_tokens: int
    has_class_token: bool
    adapter: ModelAdapter
    attn_mlp_split: AttnMlpSplit | None = None
    has_predecessor: bool = False  # whether a patched block comes before this one
    pixels: InputCapture | None = None
    tracks_state: bool = False  # whether later blocks need the state of the tokens
    tracks_positions: bool = True  # whether that state includes positions
    weighs_keys: bool = False  # whether sizes weight the attention of later blocks
    is_adaptive: bool = False  # whether the number of removed tokens depends on the image
    readers: TokenReaders | None = None  # who reads all tokens, so that those that were removed are given back
    settings: list[Setting] = field(default_factory=list)  # that were changed to enable fused attention
    # The forward of the attention module, if it passes an `attn_mask` to its fused call.
    mask_passthrough: Callable[..., Any] | None = None
    capture_slot: CaptureSlot | None = None  # of attention modules without a fused call
    tail: ExactTail | None = None  # of the last block, if nothing reads its patch tokens
    made_on: MeasurementSource | None = None  # what the schedule was made on; compared with the first batch

    def removes(self, tokens: int) -> int:
        """The number of tokens to remove if `tokens` enter the block."""
        if isinstance(self.remove, int):
            return self.remove
        return self.remove.removes(tokens, self.num_prefix_tokens)

    def check_removed(self, tokens: int, remove: int) -> None:
        """Raises ScheduleError if that number of the `tokens` that enter the block cannot be removed."""
        assert self.reduction is not None
        max_removed = self.reduction.max_removed(tokens, self.num_prefix_tokens)
        if remove > max_removed:
            raise ScheduleError(too_many(self.index, tokens, remove, max_removed, self.reduction.name))

    def check(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rejects arguments that a reducing block does not support; warns if the schedule was made on something else.

        Raises:
            ArgumentError: If an attention mask for all tokens was passed.
            UnsupportedModelError: If the attention is causal.
        """
        self.adapter.check_call(args, kwargs)
        if self.made_on is not None and not torch.compiler.is_compiling():
            made_on, self.made_on = self.made_on, None
            made_on.warn_elsewhere(device=device_name(x.device), batch_size=x.shape[0], dense_tokens=x.shape[1])

    def takes_mask(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a mask can be passed to the block's attention: its forward is known, and no other mask was passed."""
        if self.mask_passthrough is None or args or kwargs.get("attn_mask") is not None:
            return False
        return type(block.attn).forward is self.mask_passthrough and "forward" not in block.attn.__dict__

    def arriving(self, x: Tensor) -> tuple[Tensor, TokenState | None]:
        """The tokens that are left of those that enter the block (B, N, C), and their state.

        Returns:
            The tokens, (B, K, C): those that enter, unless the block before gave back the removed ones for a reader.
            Their state is None if all tokens are left or no state is tracked.

        Raises:
            UnsupportedModelError: If the state was lost, or the tokens were changed.
        """
        if not (self.has_predecessor and self.tracks_state):
            return x, None
        carried = get_state(x)
        if isinstance(carried, CarriedState):
            left, state = carried.tokens, carried.token_state
            if left is None and (state is None or state.num_tokens == x.shape[1]):
                carried.check_gradients(x)
                return x, state
            if left is not None and carried.is_unchanged(x):
                carried.check_gradients(x)
                return left, state
        raise UnsupportedModelError(
            f"The tokens that enter block {self.index} must be the output of the previous block, got other tokens. "
            "A hook that returns or changes tokens, for example, loses which tokens are left."
        )


def patch_key(root: nn.Module) -> Hashable:
    """What the patch of a model makes of it, by value: two patches with the same key give the same forward pass.

    Args:
        root: The Vision Transformer, patched or dense.
    """
    patches = [state for each in root.modules() if isinstance(state := vars(each).get("_prune_patch"), BlockPatch)]
    resize = resize_of(root)
    scaled = () if resize is None else ((_reduction_key(resize.reduction), *resize.key()),)
    blocks = tuple(
        (
            patch.index,
            _reduction_key(patch.reduction),
            patch.remove,
            patch.tracks_state,
            patch.weighs_keys,
            (patch.readers.mode, patch.readers.always) if patch.readers is not None else None,
            patch.tail is not None,
        )
        for patch in patches
    )
    return (*scaled, *blocks)


def reducing_patches(transformer: VisionTransformer) -> dict[int, BlockPatch | InputResize]:
    """The patches of a patched transformer: block -> what it reduces, or the scaling of the images as block 0.

    Args:
        transformer: Patched or dense.
    """
    resize = resize_of(transformer.root)
    states = {index: vars(block).get("_prune_patch") for index, block in enumerate(transformer.blocks)}
    found: dict[int, BlockPatch | InputResize] = {} if resize is None else {0: resize}
    return found | {i: state for i, state in states.items() if isinstance(state, BlockPatch) and state.reduction}


def _reduction_key(reduction: Reduction | None) -> Hashable:
    """A method by value: its `settings` may name a file whose content has changed, and leave attributes out."""
    try:
        hash(reduction)
    except TypeError:  # of a third party, with an attribute that cannot be hashed
        return type(reduction), repr(sorted(vars(reduction).items()))
    return reduction


class CarriedState(NamedTuple):
    """The state that a patched block attaches to its output.

    Attributes:
        token_state: None if all tokens are left.
        tokens: (B, K, C), the tokens that are left, if the output has those that were removed, too.
        form: Shape and strides of the output then.
        version: Of the output, which counts changes in place; -1 if it is not known.
        has_gradients: Whether gradients were recorded when the block ran.
    """

    token_state: TokenState | None
    tokens: Tensor | None = None
    form: tuple[Any, ...] = ()
    version: int = -1
    has_gradients: bool = True

    def check_gradients(self, x: Tensor) -> None:
        """Raises where a block runs again in backward on tokens without gradients, which it carries in its state."""
        state = self.token_state
        carries = self.tokens is not None or (state is not None and any(isinstance(c, DeltaCut) for c in state.cuts))
        if carries and not self.has_gradients and torch.is_grad_enabled() and x.requires_grad:
            raise UnsupportedModelError(
                "Reentrant checkpointing loses the gradients of tokens that are given back after a block. Use "
                "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
            )

    def is_unchanged(self, output: Tensor) -> bool:
        """Whether the output (B, N, C) of a block is as the block returned it, as far as can be known."""
        return self.form == _form_of(output) and self.version in (-1, _version_of(output))


def tokens_left(output: Tensor) -> int:
    """The number of tokens that are left in the output (B, N, C) of a block, which may give the removed ones back."""
    carried = get_state(output)
    left = carried.tokens if isinstance(carried, CarriedState) else None
    return output.shape[1] if left is None else left.shape[1]


class PatchedBlock(PatchedModule):
    """Mixin for the class of a block. Its `forward` adds the reduction; everything else is inherited."""

    _prune_patch: BlockPatch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the block with the reduction between its attention and its MLP."""
        patch = self._prune_patch
        reduction, adapter, prefix = patch.reduction, patch.adapter, patch.num_prefix_tokens
        read = patch.readers.read_of(x) if patch.readers is not None else frozenset()
        x, arrived = patch.arriving(x)
        ends = patch.tail is not None and patch.tail.runs(x)
        remove = patch.removes(x.shape[1])
        reduces = reduction is not None and (remove > 0 or patch.is_adaptive)
        if reduces:
            patch.check(x, args, kwargs)
        if reduction is not None and reduces and reduction.site == "input":
            pixels = patch.pixels.take(x) if patch.pixels is not None else None
            sequence = TokenSequence(x, prefix, patch.has_class_token, pixels=pixels)
            x, arrived = _reduce(patch, sequence, remove, arrived, read)
            reduces = False
        if ends and reduces:
            patch.check_removed(x.shape[1], remove)
            reduces = False  # all patch tokens leave, whatever their scores are
        if arrived is not None:
            args, kwargs = adapter.adapt_position_inputs(args, kwargs, arrived, prefix)
        log_sizes = arrived.log_sizes if arrived is not None else None
        reads = reduction is not None and reduces and "attention" in reduction.reads
        attn_mlp_split = patch.attn_mlp_split if reduces or ends else None
        calls: list[AttentionInputs] = []
        tap: AbstractContextManager[Any] = nullcontext()
        if not reads and log_sizes is not None and patch.takes_mask(self, args, kwargs):
            kwargs, log_sizes = {**kwargs, "attn_mask": log_sizes}, None  # the attention itself adds them to its logits
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
            stack_heads(calls)  # raises, because the sizes were not added to the logits
        if ends and attn_mlp_split is not None:
            return attn_mlp_split.mlp(self, after[:, :prefix])
        if reduces:
            sizes = arrived.sizes if arrived is not None else None
            attention = stack_heads(calls) if reads else None
            sequence = TokenSequence(after, prefix, patch.has_class_token, attention, sizes, x)
            after, arrived = _reduce(patch, sequence, remove, arrived, read)
            del attention, sequence
            calls.clear()  # frees query, key and value of all tokens
            if attn_mlp_split is not None:
                after = attn_mlp_split.mlp(self, after)
        is_read = read is None or patch.index in read
        cuts = patch.readers.cuts(arrived, after.device) if patch.readers is not None and is_read else ()
        if cuts:
            output = restored(after, cuts)
            if patch.index < patch.depth - 1:
                recorded = torch.is_grad_enabled()
                attach_state(output, CarriedState(arrived, after, _form_of(output), _version_of(output), recorded))
        else:
            output = after
            if patch.tracks_state and (patch.readers is None or patch.index < patch.depth - 1):
                attach_state(after, CarriedState(arrived, has_gradients=torch.is_grad_enabled()))
        if patch.readers is not None:
            patch.readers.mark(output, read)
        return output


class CaptureInput(PatchedModule):
    """Mixin for the class of the module that receives the images; captures them for this forward pass."""

    _prune_patch: InputCapture

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Captures the images and runs the module."""
        self._prune_patch.pixels.set(x)
        return super().forward(x, *args, **kwargs)


def _form_of(tokens: Tensor) -> tuple[Any, ...]:
    if torch.compiler.is_compiling():
        return tuple(tokens.shape)
    return (*tokens.shape, *tokens.stride(), tokens.storage_offset())


def _version_of(tokens: Tensor) -> int:
    return -1 if torch.compiler.is_compiling() or tokens.is_inference() else tokens._version


def _reduce(
    patch: BlockPatch, sequence: TokenSequence, remove: int, arrived: TokenState | None, read: frozenset[int] | None
) -> tuple[Tensor, TokenState | None]:
    reduction, readers = patch.reduction, patch.readers
    assert reduction is not None
    patch.check_removed(sequence.tokens.shape[1], remove)
    # Whether the removed tokens are given back later on.
    is_undone = readers is not None and (read is None or any(index >= patch.index for index in read))
    sequence = sequence._replace(trace=is_undone and reduction.is_lossless, block=patch.index, depth=patch.depth)
    reduced = reduction.reduce(sequence, remove)
    if sequence.trace and reduced.sources is None:
        # Positions only determine the sources if at most one token is fused, which cannot be checked without a sync.
        raise ArgumentError(
            f"`ReductionOutput.sources` must be returned by {reduction.name} if `TokenSequence.trace` is set, got "
            "None. It is lossless, and the output of this model is computed from all patch tokens."
        )
    if not patch.tracks_state:
        return reduced.tokens, None
    cut = None
    if is_undone and readers is not None:
        rule = rule_for(readers.mode, reduction)
        cut = cut_of(rule, sequence.tokens, reduced, patch.num_prefix_tokens, reduction.fused_tokens)
    return reduced.tokens, next_token_state(arrived, reduced, patch.tracks_positions, patch.weighs_keys, cut)


def too_many(block: int, tokens: int, remove: int, max_removed: int, method: str) -> str:
    """The message of the `ScheduleError` if a block should remove too many tokens."""
    return (
        f"`schedule` must remove at most {max_removed} of the {tokens} tokens that enter block {block} with {method}, "
        f"got {remove}."
    )
