"""Tensor operations shared by the reductions: reading attention, and selecting tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.reduction.base import AttentionInputs, ReductionOutput
from lightning_prune.reduction.portable import (
    descending_ranks,
    exact_product,
    is_portable,
    joined,
    one_hot,
    selection_matrix,
    whole_numbers,
)


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
    if is_exported():  # a runtime would really add the zeros
        return exact_product(one, other)
    return one.new_zeros(one.shape[0], one.shape[1], other.shape[2]).baddbmm_(one, other)


def is_exported() -> bool:
    """Whether the operations are being recorded for a runtime, by `torch.export` or in the portable form.

    What runtimes lack or compute slowly is then written in another way, with the same result.
    """
    return is_portable() or torch.compiler.is_exporting()


class Selection(NamedTuple):
    """The patch tokens that are kept of each image, in their order: K of the M = N - P patch tokens."""

    patch_indices: Tensor  # (B, K) int64, ascending indices among the patch tokens
    positions: Tensor  # (B, P + K) int64, ascending indices among all tokens, prefix tokens included
    matrix: Tensor | None = None  # (B, K, M) zeros and ones, in the portable form

    def take(self, tokens: Tensor) -> Tensor:
        """The prefix tokens and the kept ones: (B, N, C) -> (B, P + K, C)."""
        if self.matrix is None:
            return take_tokens(tokens, self.positions)
        prefix = tokens.shape[1] - self.matrix.shape[2]
        kept = precise_product(self.matrix.to(tokens.dtype), tokens[:, prefix:])
        return joined(tokens[:, :prefix], kept)

    def clear(self, values: Tensor) -> Tensor:
        """The values (B, M) of the patch tokens, with 0 for the kept ones."""
        if self.matrix is None:
            return values.scatter(1, self.patch_indices, 0.0)
        return values * (1 - self.matrix.to(values.dtype).sum(dim=1))


def select_best(scores: Tensor, keep: int, num_prefix_tokens: int, stable: bool = False) -> Selection:
    """Selects the `keep` patch tokens of each image with the highest scores.

    Args:
        scores: (B, N - P).
        keep: K, at most N - P.
        num_prefix_tokens: P, the first tokens, which are kept too.
        stable: Whether the first of equal scores is preferred on every device. It always is in the portable form;
            `topk` prefers any of them.

    Returns:
        The selection of K patch tokens, with its matrix in the portable form.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.functional import select_best
        >>> select_best(torch.tensor([[0.1, 0.9, 0.3]]), keep=2, num_prefix_tokens=1).positions
        tensor([[0, 2, 3]])
    """
    if is_portable():
        matrix = selection_matrix(descending_ranks(scores) < keep, keep)
        # The indices are used only by models that pass positions to their blocks; others export without them.
        index = (matrix * whole_numbers(0, scores.shape[1], scores)).sum(dim=2).to(torch.int64)
        return Selection(index, with_prefix(index, num_prefix_tokens), matrix)
    index = best_in_order(scores, keep, stable)
    return Selection(index, with_prefix(index, num_prefix_tokens))


def best_in_order(scores: Tensor, keep: int, stable: bool = False) -> Tensor:
    """Indices of the `keep` highest scores of each row, in ascending order.

    Args:
        scores: (B, M).
        keep: At most M.
        stable: Whether the first of equal scores is preferred; else any of them.

    Returns:
        (B, keep) int64, ascending.
    """
    if is_exported():
        # ONNX has no stable sort, ExecuTorch no sort, and TensorRT demands that the result of TopK is sorted.
        ranked = -descending_ranks(scores) if stable else scores
        return ranked.topk(keep, dim=-1).indices.topk(keep, dim=-1, largest=False).values
    if stable:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :keep].sort(dim=-1).values
    return scores.topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Selects tokens of each image by index: (B, N, C) and (B, K) -> (B, K, C).

    `index_select` copies complete rows; `gather`, which looks up every channel, is several times slower on a CPU.
    """
    batch, count, channels = tokens.shape
    if is_portable():
        return precise_product(one_hot(index, count).to(tokens.dtype), tokens)
    first = torch.arange(batch, device=index.device).unsqueeze(1) * count
    return tokens.flatten(0, 1).index_select(0, (index + first).flatten()).view(batch, index.shape[1], channels)


def take_values(values: Tensor, index: Tensor) -> Tensor:
    """Selects a value of each image by index: (B, N) and (B, K) -> (B, K), of the dtype of the values."""
    if is_portable():
        precise = torch.promote_types(values.dtype, torch.float32)
        chosen = one_hot(index, values.shape[1]).to(precise) * values.to(precise).unsqueeze(1)
        return chosen.sum(dim=2).to(values.dtype)
    return values.gather(1, index)


def with_prefix(index: Tensor, num_prefix_tokens: int) -> Tensor:
    """Converts indices among the patch tokens (B, K) to indices among all tokens (B, P + K), prefix tokens first."""
    prefix = torch.arange(num_prefix_tokens, device=index.device).expand(index.shape[0], -1)
    return joined(prefix, index + num_prefix_tokens)


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
    fused = positions < 0 if reduced.sizes is None else (positions < 0) & (reduced.sizes > 0)
    place = (fused * whole_numbers(0, positions.shape[1], positions)).sum(dim=1, keepdim=True).to(torch.int64)
    default = torch.where(fused.sum(dim=1, keepdim=True) == 1, place, -1)
    kept = kept_indices(positions, tokens)
    return torch.where(kept < 0, default, kept)


def kept_indices(positions: Tensor, tokens: int) -> Tensor:
    """The index of each of N tokens among those that are left.

    Args:
        positions: (B, K) int64, the index of each token among the N; -1 for a fused one.
        tokens: N.

    Returns:
        (B, N) int64; -1 for tokens that are gone.
    """
    if is_portable():
        matrix = one_hot(positions, tokens)  # (B, K, N)
        left = whole_numbers(1, positions.shape[1] + 1, positions)
        return ((matrix * left.unsqueeze(1)).sum(dim=1) - 1).to(torch.int64)
    left = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    targets = torch.where(positions < 0, tokens, positions)  # fused tokens write to an extra column
    nobody = torch.full((positions.shape[0], tokens + 1), -1, dtype=torch.int64, device=positions.device)
    return nobody.scatter(1, targets, left)[:, :tokens]


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
    kept = select_best(scores, scores.shape[1] - remove, num_prefix_tokens)
    return ReductionOutput(kept.take(tokens), kept.positions)
