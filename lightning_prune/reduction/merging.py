"""Merging tokens: into given destinations, or into the most similar kept token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.reduction.base import ReductionOutput
from lightning_prune.reduction.functional import is_exported, precise_product, take_tokens
from lightning_prune.reduction.portable import (
    descending_ranks,
    group_matrix,
    is_portable,
    joined,
    whole_numbers,
)


def add_rows_(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Adds rows (R, C) in place to the rows of a table (M, C) at the given indices (R,), which may repeat.

    `index_add_` does the same but takes three times as long on a CPU.
    """
    return table.scatter_add_(0, index.unsqueeze(1).expand_as(rows), rows)


def merge(
    tokens: Tensor, source: Tensor, destination: Tensor, sizes: Tensor | None = None, trace: bool = False
) -> ReductionOutput:
    """Merges source tokens into destination tokens; the tokens that are left keep their order.

    A destination becomes the mean of itself and its sources, weighted by size, and keeps its position. All other tokens
    are returned bit-identically. Sums are computed in float32 or float64. On CUDA, several sources of the same
    destination are added in arbitrary order, unless `torch.use_deterministic_algorithms(True)` is set.

    Args:
        tokens: (B, N, C).
        source: (B, R) tokens to merge, without duplicates.
        destination: (B, R) the token that each source is merged into, not a source itself. Destinations may repeat.
        sizes: (B, N) number of patches merged into each token; None if all are 1.
        trace: Whether to return `ReductionOutput.sources`.

    Returns:
        N - R tokens in the dtype of `tokens`, their positions (for a merged token that of the destination), and their
        sizes in float32 or float64.

    Source: arXiv 2210.09461, section 3 (merging by a size-weighted average).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.merging import merge
        >>> merged = merge(torch.tensor([[[1.0], [2.0], [3.0], [9.0]]]), torch.tensor([[1]]), torch.tensor([[2]]))
        >>> merged.tokens.flatten().tolist(), merged.positions.tolist(), merged.sizes.tolist()
        ([1.0, 2.5, 9.0], [[0, 2, 3]], [[1.0, 2.0, 1.0]])
    """
    batch, count, channels = tokens.shape
    left = count - source.shape[1]
    precise = torch.promote_types(tokens.dtype, torch.float32)
    table = tokens.flatten(0, 1)
    if sizes is None:  # `new_ones` has no form in Core ML
        sizes = torch.ones(batch * count, dtype=precise, device=tokens.device)
    else:
        sizes = sizes.to(precise).flatten()

    # The images form one table. `row` is the index, from 1, of each kept row among the kept ones; sources write to row
    # 0, which is cut off. The code uses few kinds of operations, because the first call of each is the slow one when
    # the caches are full of weights.
    ones = torch.ones(batch * count, dtype=torch.int64, device=tokens.device)
    index = ones.cumsum(0) - 1
    first = index[::count].unsqueeze(1)
    source_row, destination_row = (source + first).flatten(), (destination + first).flatten()
    row = ones.scatter(0, source_row, 0).cumsum(0)
    target = row.index_select(0, destination_row) - 1
    kept = index.new_empty(batch * left + 1).scatter(0, row.scatter(0, source_row, 0), index)[1:]

    moved = sizes.index_select(0, source_row)
    left_sizes = sizes.index_select(0, kept).scatter_add_(0, target, moved)
    share = (moved / left_sizes.index_select(0, target)).unsqueeze(1)

    # The mean is computed as a shift of each destination: this reads only the rows that are merged and needs no product
    # of all tokens with their sizes. A matrix product would be rounded to half precision by autocast.
    shift = (table.index_select(0, source_row).to(precise) - table.index_select(0, destination_row).to(precise)) * share
    merged = add_rows_(table.index_select(0, kept).to(precise), target, shift)

    sources = None
    if trace:
        offsets = (index[: batch * left : left] + 1).unsqueeze(1)
        sources = row.scatter(0, source_row, target + 1).view(batch, count) - offsets
    return ReductionOutput(
        merged.view(batch, left, channels).to(tokens.dtype),
        kept.view(batch, left) - first,
        left_sizes.view(batch, left),
        sources,
    )


def merge_into_targets(
    tokens: Tensor, target: Tensor, left: int, sizes: Tensor | None = None, trace: bool = False
) -> ReductionOutput:
    """The portable form of `merge`: tokens are merged by a product with the normalised matrix of their groups.

    Args:
        tokens: (B, N, C).
        target: (B, N) float32, index of the token that each token is merged into; those that are left have their own.
        left: N - R, the number of tokens that are left.
        sizes: (B, N) number of patches merged into each token; None if all are 1.
        trace: Whether to return `ReductionOutput.sources`.

    Returns:
        What `merge` returns.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.merging import merge_into_targets
        >>> tokens, target = torch.tensor([[[1.0], [2.0], [3.0], [9.0]]]), torch.tensor([[0.0, 2.0, 2.0, 3.0]])
        >>> merged = merge_into_targets(tokens, target, left=3)
        >>> merged.tokens.flatten().tolist(), merged.positions.tolist(), merged.sizes.tolist()
        ([1.0, 2.5, 9.0], [[0, 2, 3]], [[1.0, 2.0, 1.0]])
    """
    precise = torch.promote_types(tokens.dtype, torch.float32)
    groups, positions = group_matrix(target, left)
    groups = groups.to(precise)
    weights = groups if sizes is None else groups * sizes.to(precise).unsqueeze(1)
    left_sizes = weights.sum(dim=2)
    # Weights are normalised before the product, so that a token that no other is merged into has weight 1 exactly.
    merged = precise_product(weights / left_sizes.unsqueeze(2), tokens.to(precise)).to(tokens.dtype)
    rows = whole_numbers(0, left, tokens).to(precise).unsqueeze(1)
    sources = (groups * rows).sum(dim=1).to(torch.int64) if trace else None
    return ReductionOutput(merged, positions.to(torch.int64), left_sizes, sources)


def merge_into_nearest(
    tokens: Tensor,
    key: Tensor,
    scores: Tensor,
    remove: int,
    num_prefix_tokens: int,
    sizes: Tensor | None = None,
    trace: bool = False,
) -> ReductionOutput:
    """Keeps the N - P - R patch tokens with the highest scores; merges each other one into the most similar of them.

    As in ToMe (arXiv 2210.09461, section 3), similarity is the cosine of the block's keys, averaged over heads. It is
    computed between dropped and kept tokens only. See `merge` for the merging.

    Args:
        tokens: (B, N, C).
        key: (B, H, N, D), keys of the block.
        scores: (B, N - P).
        remove: R, from 1 to N - P - 1.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.
        sizes: (B, N) number of patches merged into each token; None if all are 1.
        trace: Whether to return `ReductionOutput.sources`.

    Returns:
        N - R tokens in their order, and their sizes (float32; float64 if the tokens are).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import merge_into_nearest
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]).view(1, 1, 3, 2)
        >>> tokens, scores = torch.tensor([[[4.0], [9.0], [6.0]]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> merged = merge_into_nearest(tokens, key, scores, remove=1, num_prefix_tokens=0)
        >>> merged.tokens.flatten().tolist(), merged.sizes.tolist()
        ([5.0, 9.0], [[2.0, 1.0]])
    """
    metric = mean_keys(key)
    keep = scores.shape[1] - remove
    if is_portable():
        rank = descending_ranks(scores)
        kept = rank < keep
        target = most_similar_targets(metric, rank, kept, kept, num_prefix_tokens)
        return merge_into_targets(tokens, target, tokens.shape[1] - remove, sizes, trace)
    # ExecuTorch has no sort.
    order = scores.topk(scores.shape[1], dim=-1).indices if is_exported() else scores.argsort(dim=-1, descending=True)
    order = order + num_prefix_tokens
    kept, dropped = order[:, :keep], order[:, keep:]
    return merge(tokens, dropped, most_similar(metric, dropped, kept), sizes, trace)


def mean_keys(key: Tensor) -> Tensor:
    """The mean of the keys over the heads: (B, H, N, D) -> (B, N, D), in float32 or float64."""
    # `mean` with a dtype is a single pass over the keys, and half precision would cause many ties.
    return key.mean(dim=1, dtype=torch.promote_types(key.dtype, torch.float32))


def most_similar(metric: Tensor, source: Tensor, candidates: Tensor) -> Tensor:
    """The candidate that is most similar to each source, by the cosine; of equally similar ones the first.

    Args:
        metric: (B, N, D) what similarity is computed from.
        source: (B, R) indices among the N tokens.
        candidates: (B, K) indices among the N tokens.

    Returns:
        (B, R) indices among the N tokens.
    """
    # Sources are not normalised, because their norm does not change which candidate is the most similar.
    normalised = F.normalize(take_tokens(metric, candidates), dim=-1)
    similarity = precise_product(take_tokens(metric, source), normalised.transpose(1, 2))
    return candidates.gather(1, similarity.argmax(dim=-1))


def most_similar_targets(
    metric: Tensor, rank: Tensor, stays: Tensor, candidates: Tensor, num_prefix_tokens: int
) -> Tensor:
    """The portable form of `most_similar`: the targets of all tokens for `merge_into_targets`.

    Of candidates that are equally similar, the one with the lowest rank is chosen, as by the native form if it has them
    in that order.

    Args:
        metric: (B, N, D).
        rank: (B, N - P) float32, the rank of each patch token.
        stays: (B, N - P) bool, whether a patch token is left; others go into their most similar candidate.
        candidates: (B, N - P) bool, which of those that are left others may go into.
        num_prefix_tokens: P.

    Returns:
        (B, N) float32, index of the token that each token is merged into; those that are left have their own.
    """
    metric, patches = metric[:, num_prefix_tokens:], rank.shape[1]
    similarity = precise_product(metric, F.normalize(metric, dim=-1).transpose(1, 2))
    similarity = torch.where(candidates.unsqueeze(1), similarity, float("-inf"))
    is_nearest = similarity == similarity.amax(dim=2, keepdim=True)
    nearest_rank = torch.where(is_nearest, rank.unsqueeze(1), float(patches)).amin(dim=2)
    places = whole_numbers(0, patches, rank)
    nearest = ((rank.unsqueeze(1) == nearest_rank.unsqueeze(2)).to(torch.float32) * places).sum(dim=2)
    target = torch.where(stays, places, nearest) + num_prefix_tokens
    prefix = whole_numbers(0, num_prefix_tokens, rank).expand(rank.shape[0], -1)
    return joined(prefix, target)
