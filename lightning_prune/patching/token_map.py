"""Where every patch of an image ends up: what a reduction keeps, merges and drops, for pictures and for tests."""

from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching.block_split import eval_mode
from lightning_prune.patching.models import find_vision_transformer
from lightning_prune.patching.patch_handle import PatchHandle
from lightning_prune.reduction import Reduction, ReductionOutput, TokenSequence, resolve
from lightning_prune.reduction.functional import sources_of
from lightning_prune.schedule import KeepRates, Schedule


class TokenTrace(NamedTuple):
    """What became of the patches of some images.

    Attributes:
        groups: (B, patches) int64: index, among the tokens that are left in the end, of the one that each patch went
            into; -1 where it was dropped. Patches with the same index are one token.
        held: (B, K) int64: how many patches each token that is left holds; prefix tokens and padding hold none.
        tokens: (B,) int64: tokens that are left of each image, prefix included, padding not.
        grid: Rows and columns of the patches; None where they form no grid.
    """

    groups: Tensor
    held: Tensor
    tokens: Tensor
    grid: tuple[int, int] | None


def trace_tokens(
    model: nn.Module,
    images: Tensor,
    method: str | Reduction,
    schedule: Schedule | KeepRates | None = None,
    *,
    module_path: str | None = None,
) -> TokenTrace:
    """Runs a model with a reduction, in evaluation mode, and says where every patch of the images ended up.

    Args:
        model: Any module that contains one Vision Transformer; afterwards as before, and without a patch.
        images: (B, channels, height, width) on the model's device.
        method: The reduction.
        schedule: As for `lightning_prune.patch`.
        module_path: Dotted path of the transformer in `model`, where there are several.

    Returns:
        The trace.

    Raises:
        ArgumentError: If nothing is removed, so that there is nothing to trace.
        UnsupportedModelError, ScheduleError: As `lightning_prune.patch`.

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
    transformer = find_vision_transformer(model, module_path)
    watched = _Watched(resolve(method))
    with torch.no_grad(), eval_mode(transformer.root), PatchHandle(transformer, watched, schedule):
        transformer.root.forward(images)  # past a compiled graph, which would not be watched
    if not watched.seen:
        raise ArgumentError("`schedule` removes nothing, so there is nothing to trace.")
    sources, sizes = watched.seen[0][0], watched.seen[-1][1]
    for later, _ in watched.seen[1:]:
        sources = torch.where(sources < 0, -1, later.gather(1, sources.clamp(min=0)))
    return _trace(sources[:, transformer.num_prefix_tokens :], sizes, transformer.num_prefix_tokens, images)


def _trace(groups: Tensor, sizes: Tensor, num_prefix_tokens: int, images: Tensor) -> TokenTrace:
    left = sizes.shape[1]
    ends = torch.where(groups < 0, left, groups)  # dropped ones are counted past the end
    held = torch.zeros(len(groups), left + 1, dtype=torch.int64, device=groups.device)
    held = held.scatter_add(1, ends, torch.ones_like(ends))[:, :left]
    patches, (height, width) = groups.shape[1], images.shape[-2:]
    rows = isqrt(patches * height // width)
    grid = (rows, patches // rows) if rows and rows * (patches // rows) == patches else None
    return TokenTrace(groups, held, (sizes > 0).sum(dim=1), grid)


class _Watched(Reduction):
    """A reduction that remembers what it did, block after block."""

    def __init__(self, reduction: Reduction) -> None:
        self.inner = reduction
        vars(self).update(name=reduction.name, reads=reduction.reads)  # which belong to the classes of others
        self.site, self.adaptive, self.is_lossless = reduction.site, reduction.adaptive, reduction.is_lossless
        self.tracks_sizes, self.proportional_attention = reduction.tracks_sizes, reduction.proportional_attention
        self.seen: list[tuple[Tensor, Tensor]] = []

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        reduced = self.inner.reduce(sequence._replace(trace=True), remove)
        present = torch.ones_like(reduced.positions) if reduced.sizes is None else reduced.sizes
        self.seen.append((sources_of(reduced, sequence.tokens.shape[1]), present))
        return reduced

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return self.inner.max_removed(tokens, num_prefix_tokens)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        return self.inner.unsupported_reason(model)

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()
