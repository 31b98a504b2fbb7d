"""Tensor operations that reductions share: selecting, gathering, fusing and merging tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.reduction.base import AttentionInputs, ReductionOutput


def attention_probabilities(attention: AttentionInputs, queries: slice = slice(None)) -> Tensor:
    """softmax(q k^T * scale + mask) of the selected queries, which fused attention never hands out.

    Args:
        attention: Query, key, mask and scale of one attention call.
        queries: Which query positions; one row (`slice(0, 1)`) costs a row only.

    Returns:
        (B, H, selected queries, N); of half precision on a CPU in float32, else as torch makes them of the query.
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
    """Whether the product of queries and keys is better made in float32 than in the precision of the model.

    float32 is about ten times faster on CPUs without instructions for half precision, and costs little on CPUs with
    them. True also where autocast would round a query that a rotary embedding has made float32.
    """
    halves = (torch.bfloat16, torch.float16)
    return attention.query.device.type == "cpu" and (attention.query.dtype in halves or attention.value.dtype in halves)


def precise_product(one: Tensor, other: Tensor) -> Tensor:
    """Matrix products of a batch that keep the precision of what goes into them, also under autocast.

    Autocast would round to half precision what was made float32 on purpose. It leaves operations in place alone, and
    to ask whether it is on takes longer than a small product.

    Args:
        one: (B, M, K).
        other: (B, K, N), of the same dtype.

    Returns:
        (B, M, N) of that dtype.
    """
    return one.new_zeros(one.shape[0], one.shape[1], other.shape[2]).baddbmm_(one, other)


def best_in_order(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` highest scores of every row, in their order in the row.

    Args:
        scores: (B, M).
        keep: At most M.

    Returns:
        (B, keep) int64, ascending.
    """
    return scores.topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens of every image at its own indices: (B, N, C) and (B, K) -> (B, K, C).

    Rows of a flat table are copied whole; a `gather`, which looks up every channel, is several times slower on a CPU.
    """
    batch, count, channels = tokens.shape
    first = torch.arange(batch, device=index.device).unsqueeze(1) * count
    return tokens.flatten(0, 1).index_select(0, (index + first).flatten()).view(batch, index.shape[1], channels)


def add_rows_(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Adds each of the rows (R, C) in place to that of a table (M, C) at its index (R,); an index may occur again.

    `index_add_` does the same, on a CPU in three times the time.
    """
    return table.scatter_add_(0, index.unsqueeze(1).expand_as(rows), rows)


def with_prefix(index: Tensor, num_prefix_tokens: int) -> Tensor:
    """Indices among patch tokens (B, K) -> indices among all tokens (B, P + K), the prefix tokens first."""
    prefix = torch.arange(num_prefix_tokens, device=index.device).expand(index.shape[0], -1)
    return torch.cat((prefix, index + num_prefix_tokens), dim=1)


def sources_of(reduced: ReductionOutput, tokens: int) -> Tensor:
    """Which of the tokens that are left each of those before went into.

    Args:
        reduced: What a reduction returned. Where it does not say so itself, each token that is left is the one whose
            position it has, and if exactly one has no position (-1, fused of all others) and is no padding (of size
            0), the rest went into it.
        tokens: N, tokens before.

    Returns:
        (B, N) int64 index among the tokens that are left, -1 for a token that was dropped.

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
    nowhere = positions < 0
    of_several = nowhere if reduced.sizes is None else nowhere & (reduced.sizes > 0)
    fused = torch.where(of_several, left, 0).sum(dim=1, keepdim=True)
    rest = torch.where(of_several.sum(dim=1, keepdim=True) == 1, fused, -1)
    places = torch.where(nowhere, tokens, positions)  # those without one write past the end
    return rest.repeat(1, tokens + 1).scatter(1, places, left)[:, :tokens]


def keep_best(tokens: Tensor, scores: Tensor, remove: int, num_prefix_tokens: int) -> ReductionOutput:
    """The prefix and the best N - P - R patch tokens, in their order.

    Args:
        tokens: (B, N, C).
        scores: (B, N - P), the higher the better.
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
    """Merges some tokens of every image into others; those that stay keep their order.

    A destination becomes the mean of itself and of all that go into it, each weighted by its size, and stands where it
    stood. A token that nothing goes into keeps its bits. Sums are taken in float32 at least. On CUDA, several tokens
    that go into the same one are added in no fixed order, unless `torch.use_deterministic_algorithms(True)`.

    Args:
        tokens: (B, N, C).
        source: (B, R) the tokens that go; no index twice in a row.
        destination: (B, R) the token that each goes into; it must stay itself. Many may go into one.
        sizes: (B, N) how many patches each token stands for; None where each is one.
        trace: Whether `ReductionOutput.sources` is wanted.

    Returns:
        N - R tokens in the dtype of `tokens`, their positions (a destination's own) and sizes, in float32 at least.

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

    # All images are one table: rows are counted through them, those that stay by how many stay up to them, and those
    # that go write to the first place, which is cut off. Few kinds of operations, too: with the caches full of weights,
    # calling one for the first time is what takes time.
    ones = torch.ones(batch * count, dtype=torch.int64, device=tokens.device)
    index = ones.cumsum(0) - 1
    first = index[::count].unsqueeze(1)
    going, into = (source + first).flatten(), (destination + first).flatten()
    row = ones.scatter(0, going, 0).cumsum(0)
    place = row.index_select(0, into) - 1
    kept = index.new_empty(batch * left + 1).scatter(0, row.scatter(0, going, 0), index)[1:]

    moved = sizes.index_select(0, going)
    left_sizes = sizes.index_select(0, kept).scatter_add_(0, place, moved)
    share = (moved / left_sizes.index_select(0, place)).unsqueeze(1)

    # The mean as a shift of each destination: only the rows that take part are touched, and no product of all tokens
    # with their sizes is made. No matrix product either, which autocast would round to half precision.
    shift = (table.index_select(0, going).to(precise) - table.index_select(0, into).to(precise)) * share
    merged = add_rows_(table.index_select(0, kept).to(precise), place, shift)

    sources = None
    if trace:
        sources = row.scatter(0, going, place + 1).view(batch, count) - (index[: batch * left : left] + 1).unsqueeze(1)
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
    """Keeps the best N - P - R patch tokens and merges each other one into the kept one whose key is most like its own.

    Likeness is the cosine of the block's keys averaged over heads, as in ToMe (arXiv 2210.09461, section 3), asked of
    dropped against kept tokens only; merging is that of `merging.merge`, each token as many as it stands for.

    Args:
        tokens: (B, N, C).
        key: (B, H, N, D) of the block that the tokens went through.
        scores: (B, N - P), the higher the better.
        remove: R, from 1 to N - P - 1.
        num_prefix_tokens: P, which stay and receive nothing.
        sizes: (B, N) how many patches each token stands for; None where each is one.
        trace: Whether `ReductionOutput.sources` is wanted.

    Returns:
        N - R tokens in their order, and their sizes (float32; float64 where the tokens are).

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
    # One mean with a dtype is one pass over the keys, and half precision would tie many similarities. The length of a
    # dropped token's own key scales its whole row of likenesses, so it has no say in which is the largest.
    metric = key.mean(dim=1, dtype=torch.promote_types(key.dtype, torch.float32))
    candidates = F.normalize(take_tokens(metric, kept), dim=-1)
    likeness = precise_product(take_tokens(metric, dropped), candidates.transpose(1, 2))
    return merge(tokens, dropped, kept.gather(1, likeness.argmax(dim=-1)), sizes, trace)
