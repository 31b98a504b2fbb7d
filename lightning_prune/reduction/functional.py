"""Pieces that several reductions share: attention probabilities and picking tokens."""

import torch
from torch import Tensor

from lightning_prune.reduction.base import Attention


def attention_probabilities(attention: Attention, queries: slice = slice(None)) -> Tensor:
    """softmax(q k^T * scale + mask) of the selected queries, which fused attention never hands out.

    Args:
        attention: Query, key, mask and scale of one attention call.
        queries: Which query positions; one row (`slice(0, 1)`) costs a row only.

    Returns:
        (B, H, selected queries, N) in the dtype of the query.
    """
    query = attention.query[:, :, queries]
    scale = attention.scale if attention.scale is not None else query.shape[-1] ** -0.5
    logits = (query * scale) @ attention.key.transpose(-2, -1)
    mask = attention.mask
    if mask is not None:
        if mask.shape[-2] != 1:
            mask = mask[..., queries, :]
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)


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


def with_prefix(index: Tensor, prefix_tokens: int) -> Tensor:
    """Indices among patch tokens (B, K) -> indices among all tokens (B, P + K), the prefix tokens first."""
    prefix = torch.arange(prefix_tokens, device=index.device).expand(index.shape[0], -1)
    return torch.cat((prefix, index + prefix_tokens), dim=1)
