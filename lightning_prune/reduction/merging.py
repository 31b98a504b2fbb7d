"""Merging tokens into others, by index: each counts for as many patches as it stands for."""

import torch
from torch import Tensor

from lightning_prune.reduction.base import Reduced
from lightning_prune.reduction.functional import add_rows_


def merge(
    tokens: Tensor, source: Tensor, destination: Tensor, sizes: Tensor | None = None, trace: bool = False
) -> Reduced:
    """Merges some tokens of every image into others; those that stay keep their order.

    A destination becomes the mean of itself and of all that go into it, each weighted by its size, and stands where it
    stood. A token that nothing goes into keeps its bits. Sums are taken in float32 at least. On CUDA, several tokens
    that go into the same one are added in no fixed order, unless `torch.use_deterministic_algorithms(True)`.

    Args:
        tokens: (B, N, C).
        source: (B, R) the tokens that go; no index twice in a row.
        destination: (B, R) the token that each goes into; it must stay itself. Many may go into one.
        sizes: (B, N) how many patches each token stands for; None where each is one.
        trace: Whether `Reduced.sources` is wanted.

    Returns:
        N - R tokens in the dtype of `tokens`, their positions (a destination's own) and sizes, in float32 at least.

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
    return Reduced(
        merged.view(batch, left, channels).to(tokens.dtype),
        kept.view(batch, left) - first,
        left_sizes.view(batch, left),
        sources,
    )
