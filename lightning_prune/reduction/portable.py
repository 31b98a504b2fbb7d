"""The portable form of selecting and merging tokens: comparisons, sums and matrix products of static shape.

Accelerators refuse sorting, gathering by computed indices, scattering and cumulative sums, run them as loops, or move
them to the CPU. In a portable graph ranks are counted instead, and tokens are selected or merged by the product with a
matrix. The results are those of the native form, which is faster in PyTorch. Of equal scores the first is preferred.

Whole numbers are held in float32, which is exact up to 2**24: many accelerators have no 64-bit integers. A product with
a matrix of zeros and ones is exact if all tokens are finite, and the product is computed in their precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_PORTABLE: ContextVar[bool] = ContextVar("portable_graph", default=False)


@contextmanager
def portable_graph() -> Iterator[None]:
    """Inside it, the methods of this package select and merge tokens in the portable form, in this thread.

    Use it around the export of a patched model. The methods keep their results: a token that is kept stays
    bit-identical, and merged tokens differ by rounding. The graph has no Loop, If, NonZero, Sort, TopK, Scatter or
    CumSum, and it gathers nothing by an index that is computed from the images. It costs about N**2 comparisons, and
    products of the tokens with a matrix of N - R times N for each reducing block. `VWTInter` needs `pad_to="image"`.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> from lightning_prune.reduction import portable_graph
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
        >>> handle = lp.patch(model, "topk", [56])
        >>> with torch.no_grad(), portable_graph():
        ...     program = torch.export.export(model, (torch.zeros(1, 3, 224, 224),))
        >>> any("topk" in str(node.target) for node in program.graph.nodes)
        False
    """
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def is_portable() -> bool:
    """Whether the portable form was asked for, by `portable_graph`."""
    return _PORTABLE.get()


def exact_product(one: Tensor, other: Tensor) -> Tensor:
    """The matrix product (..., M, K) @ (..., K, N) in the precision of its operands, also under autocast."""
    # An exported graph would hold the context as a graph of its own.
    if not torch.is_autocast_enabled(one.device.type):
        return one @ other
    with torch.autocast(one.device.type, enabled=False):
        return one @ other


def joined(*parts: Tensor) -> Tensor:
    """The parts (B, ..., n) along dimension 1, without the empty ones, which OpenVINO cannot convert."""
    filled = [part for part in parts if part.shape[1]]
    return torch.cat(filled, dim=1) if len(filled) > 1 else filled[0]


def whole_numbers(start: int, end: int, like: Tensor) -> Tensor:
    """The float32 numbers from `start` to `end` - 1, on the device of `like`."""
    return torch.arange(start, end, dtype=torch.float32, device=like.device)


def descending_ranks(scores: Tensor) -> Tensor:
    """The rank of each score in its row, from 0 for the highest; of equal scores the first has the lower rank.

    Args:
        scores: (B, M).

    Returns:
        (B, M) float32.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.portable import descending_ranks
        >>> descending_ranks(torch.tensor([[2.0, 5.0, 2.0]]))
        tensor([[1., 0., 2.]])
    """
    places = whole_numbers(0, scores.shape[1], scores)
    one, other = scores.unsqueeze(2), scores.unsqueeze(1)
    first = places < places.unsqueeze(1)  # [i, j]: j comes before i
    return ((other > one) | ((other == one) & first)).to(torch.float32).sum(dim=2)


def selection_matrix(kept: Tensor, rows: int) -> Tensor:
    """The matrix whose product with the tokens of an image is the kept ones, in their order.

    Args:
        kept: (B, N) bool.
        rows: K, at least the number of kept tokens of each image. Further rows are zero.

    Returns:
        (B, K, N) float32, zeros and ones.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.portable import selection_matrix
        >>> selection_matrix(torch.tensor([[True, False, True]]), rows=2)
        tensor([[[1., 0., 0.],
                 [0., 0., 1.]]])
    """
    places = whole_numbers(0, kept.shape[1], kept)
    upto = places <= places.unsqueeze(1)  # [i, j]: j is i or comes before it
    row = (kept.unsqueeze(1) & upto).to(torch.float32).sum(dim=2) * kept.to(torch.float32)  # from 1; 0 if not kept
    return (row.unsqueeze(1) == whole_numbers(1, rows + 1, kept).unsqueeze(1)).to(torch.float32)


def one_hot(index: Tensor, count: int) -> Tensor:
    """The matrix whose product with `count` rows takes those at the given indices.

    Args:
        index: (B, K); the row of an index outside of 0 to `count` - 1 is zero.
        count: Number of rows to take from.

    Returns:
        (B, K, count) float32, zeros and ones.
    """
    return (index.to(torch.float32).unsqueeze(2) == whole_numbers(0, count, index)).to(torch.float32)


def first_index(found: Tensor) -> Tensor:
    """The index of the first true element along the last dimension: (..., M) bool -> (...) float32; M if none is."""
    count = found.shape[-1]
    return torch.where(found, whole_numbers(0, count, found), float(count)).amin(dim=-1)


def group_matrix(target: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The matrix that sums the tokens of each group, groups in the order of the tokens that they are merged into.

    Args:
        target: (B, N) float32, index of the token that each token is merged into. Those that are their own target are
            left; every target is one of them.
        rows: K, at least the number of tokens that are left of each image. Further rows are zero.

    Returns:
        (B, K, N) float32, zeros and ones: whether a token is merged into the one that is left; and (B, K) float32, the
        index of the token that is left, -1 for further rows.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.portable import group_matrix
        >>> group_matrix(torch.tensor([[0.0, 2.0, 2.0]]), rows=2)
        (tensor([[[1., 0., 0.],
                 [0., 1., 1.]]]), tensor([[0., 2.]]))
    """
    places = whole_numbers(0, target.shape[1], target)
    left = (selection_matrix(target == places, rows) * (places + 1)).sum(dim=2) - 1
    return (left.unsqueeze(2) == target.unsqueeze(1)).to(torch.float32), left
