"""Merging tokens into others, by index: each counts for as many patches as it stands for."""

import torch
from torch import Tensor

from lightning_prune.reduction.base import Reduced
from lightning_prune.reduction.functional import add_rows, take_tokens


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
    batch, count, _ = tokens.shape
    left = count - source.shape[1]
    precise = torch.promote_types(tokens.dtype, torch.float32)
    sizes = tokens.new_ones((batch, count), dtype=precise) if sizes is None else sizes.to(precise)

    # Those that stay are numbered by how many go before them; those that go write to a column that is cut off.
    index = torch.arange(count, device=tokens.device).expand(batch, -1)
    gone = index.new_zeros((batch, count)).scatter(1, source, 1)
    slots = index - gone.cumsum(dim=1)
    place = slots.gather(1, destination)
    kept = index.new_empty((batch, left + 1)).scatter(1, slots.masked_fill(gone.bool(), left), index)[:, :left]

    moved = sizes.gather(1, source)
    left_sizes = sizes.gather(1, kept).scatter_add(1, place, moved)
    share = (moved / left_sizes.gather(1, place)).unsqueeze(2)

    # The mean as a shift of each destination: only the rows that take part are touched, and no product of all tokens
    # with their sizes is made. No matrix product either, which autocast would round to half precision.
    shift = (take_tokens(tokens, source).to(precise) - take_tokens(tokens, destination).to(precise)) * share
    rows = (place + torch.arange(batch, device=tokens.device).unsqueeze(1) * left).flatten()
    merged = add_rows(take_tokens(tokens, kept).to(precise).flatten(0, 1), rows, shift.flatten(0, 1))

    sources = None
    if trace:
        sources = index.scatter(1, kept, index[:, :left]).scatter(1, source, place)
    return Reduced(merged.view(batch, left, -1).to(tokens.dtype), kept, left_sizes, sources)
