"""Tensor operations shared by the reductions: selecting, gathering, fusing and merging tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.reduction.base import AttentionInputs, ReductionOutput


def attention_probabilities(attention: AttentionInputs, queries: slice = slice(None)) -> Tensor:
    """softmax(q k^T * scale + mask) for the selected queries, which fused attention does not return.

    Args:
        attention: Query, key, mask and scale of one attention call.
        queries: The query positions to compute, for example `slice(0, 1)` for the first row only.

    Returns:
        (B, H, selected queries, N), float32 if the model runs in half precision on a CPU, else the dtype of the query.
    """
    query = attention.query[:, :, queries]
    scale = attention.scale if attention.scale is not None else query.shape[-1] ** -0.5
    if is_half_on_cpu(attention):
        wide, keys = query.float() * scale, attention.key.float().transpose(-2, -1)
        logits = precise_product(wide.flatten(0, 1), keys.flatten(0, 1)).unflatten(0, query.shape[:2])
    else:
        logits = (query * scale) @ attention.key.transpose(-2, -1)
    mask = attention.mask
    if mask is not None:
        if mask.shape[-2] != 1:
            mask = mask[..., queries, :]
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)


def is_half_on_cpu(attention: AttentionInputs) -> bool:
    """Whether to compute the product of queries and keys in float32 instead of the model's precision.

    float32 is about ten times faster on CPUs without half-precision instructions, and hardly slower on CPUs with them.
    This includes queries that a rotary embedding has converted to float32, which autocast would round.
    """
    halves = (torch.bfloat16, torch.float16)
    return attention.query.device.type == "cpu" and (attention.query.dtype in halves or attention.value.dtype in halves)


def precise_product(one: Tensor, other: Tensor) -> Tensor:
    """Batched matrix product in the precision of its operands, also under autocast.

    Autocast would round float32 operands to half precision. It does not affect in-place operations, and checking
    whether it is on takes longer than a small product.

    Args:
        one: (B, M, K).
        other: (B, K, N), of the same dtype.

    Returns:
        (B, M, N) of that dtype.
    """
    return one.new_zeros(one.shape[0], one.shape[1], other.shape[2]).baddbmm_(one, other)


def best_in_order(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` highest scores of each row, in ascending order.

    Args:
        scores: (B, M).
        keep: At most M.

    Returns:
        (B, keep) int64, ascending.
    """
    return scores.topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Selects tokens of each image by index: (B, N, C) and (B, K) -> (B, K, C).

    `index_select` copies complete rows; `gather`, which looks up every channel, is several times slower on a CPU.
    """
    batch, count, channels = tokens.shape
    first = torch.arange(batch, device=index.device).unsqueeze(1) * count
    return tokens.flatten(0, 1).index_select(0, (index + first).flatten()).view(batch, index.shape[1], channels)


def add_rows_(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Adds rows (R, C) in place to the rows of a table (M, C) at the given indices (R,), which may repeat.

    `index_add_` does the same but takes three times as long on a CPU.
    """
    return table.scatter_add_(0, index.unsqueeze(1).expand_as(rows), rows)


def with_prefix(index: Tensor, num_prefix_tokens: int) -> Tensor:
    """Converts indices among the patch tokens (B, K) to indices among all tokens (B, P + K), prefix tokens first."""
    prefix = torch.arange(num_prefix_tokens, device=index.device).expand(index.shape[0], -1)
    return torch.cat((prefix, index + num_prefix_tokens), dim=1)


def sources_of(reduced: ReductionOutput, tokens: int) -> Tensor:
    """Maps each token before a reduction to the token that it became part of.

    Args:
        reduced: The output of the reduction. If it has no `sources`, they follow from the positions: each token with a
            position was kept, and if exactly one token has none (-1) and is not padding (size 0), all other tokens were
            fused into it.
        tokens: N, the number of tokens before the reduction.

    Returns:
        (B, N) int64, indices among the tokens that are left; -1 for tokens that were dropped.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import ReductionOutput
        >>> sources_of(ReductionOutput(torch.zeros(1, 3, 8), torch.tensor([[0, 2, -1]])), tokens=5)
        tensor([[0, 2, 1, 2, 2]])
    """
    if reduced.sources is not None:
        return reduced.sources
    positions = reduced.positions
    left = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    without_position = positions < 0
    fused = without_position if reduced.sizes is None else without_position & (reduced.sizes > 0)
    fused_index = torch.where(fused, left, 0).sum(dim=1, keepdim=True)
    default = torch.where(fused.sum(dim=1, keepdim=True) == 1, fused_index, -1)
    targets = torch.where(without_position, tokens, positions)  # tokens without a position write to an extra column
    return default.repeat(1, tokens + 1).scatter(1, targets, left)[:, :tokens]


def keep_best(tokens: Tensor, scores: Tensor, remove: int, num_prefix_tokens: int) -> ReductionOutput:
    """Keeps the prefix tokens and the N - P - R patch tokens with the highest scores, in their order.

    Args:
        tokens: (B, N, C).
        scores: (B, N - P).
        remove: R.
        num_prefix_tokens: P.

    Returns:
        N - R tokens.
    """
    index = with_prefix(best_in_order(scores, scores.shape[1] - remove), num_prefix_tokens)
    return ReductionOutput(take_tokens(tokens, index), index)


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
        >>> from lightning_prune.reduction.functional import merge
        >>> merged = merge(torch.tensor([[[1.0], [2.0], [3.0], [9.0]]]), torch.tensor([[1]]), torch.tensor([[2]]))
        >>> merged.tokens.flatten().tolist(), merged.positions.tolist(), merged.sizes.tolist()
        ([1.0, 2.5, 9.0], [[0, 2, 3]], [[1.0, 2.0, 1.0]])
    """
    batch, count, channels = tokens.shape
    left = count - source.shape[1]
    precise = torch.promote_types(tokens.dtype, torch.float32)
    table = tokens.flatten(0, 1)
    sizes = tokens.new_ones(batch * count, dtype=precise) if sizes is None else sizes.to(precise).flatten()

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
    order = scores.argsort(dim=-1, descending=True) + num_prefix_tokens
    kept, dropped = order[:, : scores.shape[1] - remove], order[:, scores.shape[1] - remove :]
    # `mean` with a dtype is a single pass over the keys, and half precision would cause many ties. The keys of dropped
    # tokens are not normalised, because their norm does not change which kept token is the most similar.
    metric = key.mean(dim=1, dtype=torch.promote_types(key.dtype, torch.float32))
    candidates = F.normalize(take_tokens(metric, kept), dim=-1)
    similarity = precise_product(take_tokens(metric, dropped), candidates.transpose(1, 2))
    return merge(tokens, dropped, kept.gather(1, similarity.argmax(dim=-1)), sizes, trace)
