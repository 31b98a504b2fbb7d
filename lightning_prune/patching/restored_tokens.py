"""Gives removed tokens back to whoever reads all N of them: `copy` and `delta`, pure functions of tensors.

A cut turns N tokens into K. What later blocks make of the K is brought back to N by one of two rules:

- copy: a removed token takes the token that it went into; one that was dropped takes its nearest kept one at the cut.
- delta: a removed token keeps its own state at the cut, and takes the mean change since then of the `NEIGHBOURS` kept
  patch tokens nearest to it at the cut, by L2 distance (Perkzi/IPCV, 2026-03, restores what it drops in this way).

A kept token is itself. Tokens that went through several cuts are brought back from the last cut to the first.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_prune.reduction.base import ReductionOutput
from lightning_prune.reduction.functional import (
    is_exported,
    kept_indices,
    precise_product,
    select_best,
    sources_of,
    take_tokens,
    take_values,
)
from lightning_prune.reduction.portable import exact_product, first_index, is_portable, joined, one_hot, whole_numbers

RestoreRule = Literal["copy", "delta"]

NEIGHBOURS = 10
_DISTANCES = 2**22  # held at once: 16 MiB in float32
_VALUES = 2**20  # of neighbours of an image, held at once


class CopyCut(NamedTuple):
    """A cut that is undone by copying.

    Attributes:
        sources: (B, N) int64, the index among the K tokens that are left of the one that each of the N takes.
    """

    sources: Tensor

    def undo(self, tokens: Tensor) -> Tensor:
        """(B, K, C), what the tokens that are left have become -> (B, N, C)."""
        return take_tokens(tokens, self.sources)


class DeltaCut(NamedTuple):
    """A cut that is undone by adding what has changed since then. G tokens are looked at, all that were removed.

    Attributes:
        before: (B, G, C), the state at the cut of those that were removed.
        after: (B, K, C), what was left of all tokens.
        sources: (B, N) int64, the index of each token among the K, or K + its index among the G if it was removed.
        nearest: (B, G, k) int64, the kept patch tokens nearest to each of the G, as indices among the K.
        valid: (B, K) bool, whether a token is a kept patch token; others are nobody's neighbours.
    """

    before: Tensor
    after: Tensor
    sources: Tensor
    nearest: Tensor
    valid: Tensor

    def undo(self, tokens: Tensor) -> Tensor:
        """(B, K, C), what the tokens that are left have become -> (B, N, C)."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        change = (tokens.to(wide) - self.after.to(wide)) * self.valid.unsqueeze(2).to(wide)
        found = self.valid.sum(dim=1).clamp(1, self.nearest.shape[2])
        moved = self.before.to(wide) + _sum_of(change, self.nearest) / found[:, None, None].to(wide)
        return take_tokens(joined(tokens, moved.to(tokens.dtype)), self.sources)


class GridCut(NamedTuple):
    """A cut of images that were scaled down, which is undone by interpolating between the cells of the smaller grid.

    Attributes:
        rows: (H, h), what each of H rows takes of the h rows of the smaller grid.
        columns: (W, w), likewise.
        num_prefix_tokens: P.
    """

    rows: Tensor
    columns: Tensor
    num_prefix_tokens: int

    def undo(self, tokens: Tensor) -> Tensor:
        """(B, P + h w, C), what the tokens have become -> (B, P + H W, C)."""
        prefix = tokens[:, : self.num_prefix_tokens]
        wide = torch.promote_types(tokens.dtype, torch.float32)
        grid = tokens[:, self.num_prefix_tokens :].to(wide).unflatten(1, (self.rows.shape[1], self.columns.shape[1]))
        tall = exact_product(self.rows.to(wide), grid.flatten(2)).unflatten(2, grid.shape[2:])  # (B, H, w, C)
        patches = exact_product(self.columns.to(wide), tall).flatten(1, 2)
        return joined(prefix, patches.to(tokens.dtype))


Cut = CopyCut | DeltaCut | GridCut


def cut_of(
    rule: RestoreRule,
    before: Tensor,
    reduced: ReductionOutput,
    num_prefix_tokens: int,
    fused_tokens: int | None = None,
) -> Cut:
    """What undoes a reduction.

    Args:
        rule: `"copy"` or `"delta"`.
        before: (B, N, C), the tokens at the cut.
        reduced: What the reduction made of them. With `sources`, if the method merges tokens.
        num_prefix_tokens: P.
        fused_tokens: How many of the K tokens of an image have no position at most; None if it is not known. Neighbours
            are then looked for of all patch tokens, and otherwise of as many as can have been removed.

    Returns:
        The cut.

    Example:
        >>> import torch
        >>> from lightning_prune.patching.restored_tokens import cut_of
        >>> from lightning_prune.reduction import ReductionOutput
        >>> before = torch.tensor([[[9.0], [1.0], [2.0], [5.0]]])  # a prefix token and three patches
        >>> left = ReductionOutput(before[:, [0, 1, 3]], torch.tensor([[0, 1, 3]]))
        >>> cut_of("copy", before, left, 1).undo(left.tokens + 10)[0, :, 0].tolist()
        [19.0, 11.0, 11.0, 15.0]
        >>> cut_of("delta", before, left, 1).undo(left.tokens + 10)[0, :, 0].tolist()
        [19.0, 11.0, 12.0, 15.0]
    """
    count, left = before.shape[1], reduced.tokens
    if rule == "copy":
        sources = sources_of(reduced, count)
        if reduced.sources is not None:
            return CopyCut(sources)
    else:
        sources = kept_indices(reduced.positions, count)
    patches = count - num_prefix_tokens
    gone = patches if fused_tokens is None else min(patches, count - left.shape[1] + fused_tokens)
    # Those that were removed come first. If fewer than G were, kept ones fill up, of which nothing is taken.
    removed = select_best((sources[:, num_prefix_tokens:] < 0).float(), gone, num_prefix_tokens)
    states = removed.take(before)[:, num_prefix_tokens:]
    valid = reduced.positions >= num_prefix_tokens
    nearest = nearest_kept(states, left, valid, num_prefix_tokens, 1 if rule == "copy" else NEIGHBOURS)
    place = kept_indices(removed.positions[:, num_prefix_tokens:], count)  # of each of the N among the G
    if rule == "copy":
        taken = take_values(nearest[..., 0], place.clamp(min=0))
        return CopyCut(torch.where(sources < 0, taken, sources))
    return DeltaCut(states, left, torch.where(sources < 0, left.shape[1] + place, sources), nearest, valid)


def with_cut(cuts: tuple[Cut, ...], cut: Cut) -> tuple[Cut, ...]:
    """The cuts and one more; two copies in turn are one copy."""
    last = cuts[-1] if cuts else None
    if isinstance(last, CopyCut) and isinstance(cut, CopyCut):
        return (*cuts[:-1], CopyCut(take_values(cut.sources, last.sources)))
    return (*cuts, cut)


def restored(tokens: Tensor, cuts: tuple[Cut, ...]) -> Tensor:
    """All tokens of block 0: (B, K, C), what is left after the cuts -> (B, N, C)."""
    for cut in reversed(cuts):
        tokens = cut.undo(tokens)
    return tokens


def nearest_kept(tokens: Tensor, after: Tensor, valid: Tensor, num_prefix_tokens: int, count: int) -> Tensor:
    """The kept patch tokens nearest to each of several tokens, by L2 distance.

    Args:
        tokens: (B, G, C), at the cut.
        after: (B, K, C), the tokens that are left.
        valid: (B, K) bool, which of these may be chosen: none of the first P.
        num_prefix_tokens: P.
        count: How many; fewer if K - P is less.

    Returns:
        (B, G, k) int64, indices among the K, in any order. Where fewer are valid, the others are not.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    one, other = tokens.to(wide), after[:, num_prefix_tokens:].to(wide)
    usable = valid[:, num_prefix_tokens:].unsqueeze(1)
    count = min(count, other.shape[1])
    keys, lengths = other.transpose(1, 2), other.square().sum(dim=2).unsqueeze(1)
    far = torch.finfo(wide).max  # finite: farther than any, but nearer than one that was found already
    # Rows are looked at in parts, so that memory does not grow with N**2. Traced graphs have one part.
    rows = max(1, _DISTANCES // max(1, other.shape[0] * other.shape[1]))
    parts = one.split(rows, dim=1) if one.shape[1] and not torch.compiler.is_compiling() else (one,)
    found = []
    for part in parts:
        # The squared distance but for the length of the row's own token, which ranks nothing.
        distances = torch.where(usable, lengths - 2 * precise_product(part, keys), far)
        found.append(_smallest(distances, count) + num_prefix_tokens)
    return torch.cat(found, dim=1)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Indices (B, M, count) of the smallest of (B, M, K) values."""
    if not is_portable():
        return values.topk(count, dim=-1, largest=False, sorted=is_exported()).indices
    places, found = whole_numbers(0, values.shape[-1], values), []
    for _ in range(count):
        found.append(first_index(values == values.amin(dim=-1, keepdim=True)).unsqueeze(-1))
        values = torch.where(places == found[-1], float("inf"), values)
    return torch.cat(found, dim=-1).to(torch.int64)


def _sum_of(tokens: Tensor, index: Tensor) -> Tensor:
    """The sum of several tokens: (B, K, C) and (B, M, k) -> (B, M, C)."""
    if is_portable():
        weights = sum(one_hot(column, tokens.shape[1]) for column in index.unbind(dim=-1))
        assert isinstance(weights, Tensor)
        return precise_product(weights.to(tokens.dtype), tokens)
    values = index.shape[1] * tokens.shape[2]
    # In parts, as all of them at once are k times the tokens. Their number must not depend on the batch: it rounds.
    held = max(1, _VALUES // max(1, values)) if isinstance(values, int) else index.shape[2]
    parts = []
    for part in index.split(held, dim=2):
        taken = take_tokens(tokens, part.flatten(1)).unflatten(1, part.shape[1:])
        parts.append(taken.sum(dim=2) if part.shape[2] > 1 else taken.squeeze(2))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
