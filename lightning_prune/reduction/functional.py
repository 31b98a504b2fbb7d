"""Pieces that several reductions share: attention probabilities, picking tokens, tracing them."""

import torch
from torch import Tensor

from lightning_prune.reduction.base import Attention, Reduced


def attention_probabilities(attention: Attention, queries: slice = slice(None)) -> Tensor:
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


def is_half_on_cpu(attention: Attention) -> bool:
    """Whether the product of queries and keys is better made in float32 than in the precision of the model.

    A processor that has no instructions for half precision takes ten times as long in it; to one that has, this product
    of one block is little. Also where autocast would round to it a query that a rotary embedding has made wide.
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


def with_prefix(index: Tensor, prefix_tokens: int) -> Tensor:
    """Indices among patch tokens (B, K) -> indices among all tokens (B, P + K), the prefix tokens first."""
    prefix = torch.arange(prefix_tokens, device=index.device).expand(index.shape[0], -1)
    return torch.cat((prefix, index + prefix_tokens), dim=1)


def sources_of(reduced: Reduced, tokens: int) -> Tensor:
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
        >>> from lightning_prune.reduction import Reduced
        >>> sources_of(Reduced(torch.zeros(1, 3, 8), torch.tensor([[0, 2, -1]])), tokens=5)
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


def keep_best(tokens: Tensor, scores: Tensor, remove: int, prefix_tokens: int) -> Reduced:
    """The prefix and the best N - P - R patch tokens, in their order.

    Args:
        tokens: (B, N, C).
        scores: (B, N - P), the higher the better.
        remove: R.
        prefix_tokens: P.

    Returns:
        N - R tokens.
    """
    index = with_prefix(best_in_order(scores, scores.shape[1] - remove), prefix_tokens)
    return Reduced(take_tokens(tokens, index), index)
