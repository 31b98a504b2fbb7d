"""Traces which patches of an image a reduction keeps, merges and drops."""

from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune._utils.validation import check_images
from lightning_prune.errors import ArgumentError
from lightning_prune.patching.api import make_handle
from lightning_prune.patching.input_resize import resize_of
from lightning_prune.patching.models import find_vision_transformer
from lightning_prune.patching.patched_block import BlockPatch
from lightning_prune.patching.token_readers import RestoreMode
from lightning_prune.reduction import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import sources_of
from lightning_prune.schedule import MethodSpec, ScheduleLike


class TokenTrace(NamedTuple):
    """The assignment of patches to the tokens that are left after the last block.

    Attributes:
        groups: (B, patches) int64, index of the final token that each patch became part of; -1 if it was dropped.
            Patches with the same index were merged.
        held: (B, K) int64, number of patches in each final token; 0 for prefix tokens and padding.
        tokens: (B,) int64, number of final tokens of each image, with prefix tokens and without padding.
        grid: Rows and columns of the patches; None if they form no grid.
    """

    groups: Tensor
    held: Tensor
    tokens: Tensor
    grid: tuple[int, int] | None


def trace_tokens(
    model: nn.Module,
    images: Tensor,
    method: str | MethodSpec | Reduction | ScheduleLike,
    schedule: ScheduleLike | None = None,
    *,
    module_path: str | None = None,
    restore: RestoreMode | None = None,
) -> TokenTrace:
    """Runs a model with a reduction, in evaluation mode, and traces every patch of the images.

    Args:
        model: Any module that contains one Vision Transformer. It is restored afterwards; an existing patch is removed.
        images: (B, channels, height, width) on the model's device.
        method: See `lightning_prune.patch`; left out if the schedule names its method, or one for each block.
        schedule: See `lightning_prune.patch`.
        module_path: Dotted path of the transformer in `model`, if there are several.
        restore: See `lightning_prune.patch`; needed by models that read a grid after the blocks.

    Returns:
        The trace.

    Raises:
        ArgumentError: If the schedule removes nothing, or `images` are none.
        UnsupportedModelError, ScheduleError: See `lightning_prune.patch`.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> from lightning_prune.patching import trace_tokens
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> trace = trace_tokens(model, torch.randn(2, 3, 224, 224), "pomt", lp.Schedule.single(4, 1, 56))
        >>> trace.tokens.tolist(), trace.grid
        ([141, 141], (14, 14))
    """
    transformer = find_vision_transformer(model, module_path, restore)
    check_images("images", images)
    outputs: list[tuple[Tensor, Tensor]] = []
    # The last block traces too, so it must not run with the exact tail.
    with torch.no_grad(), transformer.isolated(), make_handle(transformer, method, schedule, tail=False) as handle:
        for block in transformer.blocks:
            block_patch = vars(block).get("_prune_patch")
            if isinstance(block_patch, BlockPatch) and block_patch.reduction is not None:
                block_patch.reduction = _RecordingReduction(block_patch.reduction, outputs)
        resize = resize_of(transformer.root)
        if resize is not None:
            outputs.append(resize.sources(images))
        transformer.run_eagerly(images)  # not a compiled graph, which would not call the recorder
    if not outputs:
        raise ArgumentError(f"`schedule` must remove tokens to be traced, got {handle.schedule!r}.")
    sources, sizes = outputs[0][0], outputs[-1][1]
    for later, _ in outputs[1:]:
        sources = torch.where(sources < 0, -1, later.gather(1, sources.clamp(min=0)))
    return _trace(sources[:, transformer.num_prefix_tokens :], sizes, transformer.num_prefix_tokens, images)


def _trace(groups: Tensor, sizes: Tensor, num_prefix_tokens: int, images: Tensor) -> TokenTrace:
    left = sizes.shape[1]
    columns = torch.where(groups < 0, left, groups)  # dropped patches are counted in an extra column
    held = torch.zeros(len(groups), left + 1, dtype=torch.int64, device=groups.device)
    held = held.scatter_add(1, columns, torch.ones_like(columns))[:, :left]
    patches, (height, width) = groups.shape[1], images.shape[-2:]
    rows = isqrt(patches * height // width)
    grid = (rows, patches // rows) if rows and rows * (patches // rows) == patches else None
    return TokenTrace(groups, held, (sizes > 0).sum(dim=1), grid)


class _RecordingReduction(Reduction):
    """Wraps a reduction and records the sources and sizes of its outputs in every block."""

    def __init__(self, reduction: Reduction, outputs: list[tuple[Tensor, Tensor]]) -> None:
        self.inner = reduction
        vars(self).update(name=reduction.name, reads=reduction.reads)  # class attributes in other reductions
        self.site, self.adaptive, self.is_lossless = reduction.site, reduction.adaptive, reduction.is_lossless
        self.tracks_sizes, self.proportional_attention = reduction.tracks_sizes, reduction.proportional_attention
        self.outputs = outputs

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        reduced = self.inner.reduce(sequence._replace(trace=True), remove)
        sizes = torch.ones_like(reduced.positions) if reduced.sizes is None else reduced.sizes
        self.outputs.append((sources_of(reduced, sequence.tokens.shape[1]), sizes))
        return reduced

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return self.inner.max_removed(tokens, num_prefix_tokens)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        return self.inner.unsupported_reason(model)

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()
