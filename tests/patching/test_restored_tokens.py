"""Giving tokens back: against loops over the tokens of each image."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.patching.restored_tokens import (
    NEIGHBOURS,
    CopyCut,
    DeltaCut,
    GridCut,
    cut_of,
    nearest_kept,
    restored,
    with_cut,
)
from lightning_prune.reduction import ReductionOutput, TokenSequence, portable_graph, resolve
from lightning_prune.reduction.functional import kept_indices
from lightning_prune.reduction.resize import resampling_matrix

PREFIX = 2


def tokens_of(batch: int, count: int, seed: int = 0, channels: int = 6) -> Tensor:
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dropped(before: Tensor, keep: int, fused: bool = False, seed: int = 1) -> ReductionOutput:
    """A reduction that keeps other patches in each image, and appends the mean of the others if `fused`."""
    generator = torch.Generator().manual_seed(seed)
    patches = before.shape[1] - PREFIX
    rows = [sorted(torch.randperm(patches, generator=generator)[:keep].tolist()) for _ in before]
    positions = torch.tensor([[*range(PREFIX), *(PREFIX + i for i in row)] for row in rows])
    left = torch.stack([x[row] for x, row in zip(before, positions, strict=True)])
    if not fused:
        return ReductionOutput(left, positions)
    gone = [sorted(set(range(before.shape[1])) - set(row.tolist())) for row in positions]
    means = torch.stack([x[row].mean(0) for x, row in zip(before, gone, strict=True)]).unsqueeze(1)
    return ReductionOutput(torch.cat((left, means), 1), torch.cat((positions, torch.full((len(before), 1), -1)), 1))


def by_copy(before: Tensor, reduced: ReductionOutput, now: Tensor) -> Tensor:
    """One image after the other: the sources, else the nearest kept patch at the cut."""
    out = torch.empty_like(before)
    for b, x in enumerate(before):
        places = reduced.positions[b].tolist()
        fused = places.index(-1) if -1 in places else None
        for i in range(len(x)):
            if reduced.sources is not None:
                out[b, i] = now[b, reduced.sources[b, i]]
            elif i in places:
                out[b, i] = now[b, places.index(i)]
            elif fused is not None:
                out[b, i] = now[b, fused]
            else:
                far = {k: float((x[i] - reduced.tokens[b, k]).norm()) for k, at in enumerate(places) if at >= PREFIX}
                out[b, i] = now[b, min(far, key=lambda k: far[k])]
    return out


def by_delta(before: Tensor, reduced: ReductionOutput, now: Tensor) -> Tensor:
    """One image after the other: the own state at the cut, and the mean change of the nearest kept patches."""
    out = torch.empty_like(before)
    for b, x in enumerate(before):
        places = reduced.positions[b].tolist()
        kept = [k for k, at in enumerate(places) if at >= PREFIX]
        for i in range(len(x)):
            if i in places:
                out[b, i] = now[b, places.index(i)]
                continue
            far = sorted(kept, key=lambda k: float((x[i] - reduced.tokens[b, k]).norm()))[:NEIGHBOURS]
            out[b, i] = x[i] + torch.stack([now[b, k] - reduced.tokens[b, k] for k in far]).mean(0)
    return out


LOOPS = {"copy": by_copy, "delta": by_delta}


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("rule", ["copy", "delta"])
@pytest.mark.parametrize(("fused", "fused_tokens"), [(False, 0), (False, 1), (False, None), (True, 1), (True, None)])
@pytest.mark.parametrize(("keep", "batch"), [(25, 1), (25, 3), (12, 2), (3, 2), (1, 2)])
def test_dropped_tokens_are_given_back(
    rule: Any, keep: int, batch: int, fused: bool, fused_tokens: int | None, portable: bool
) -> None:
    before = tokens_of(batch, 40 + PREFIX)
    reduced = dropped(before, keep, fused)
    now = tokens_of(batch, reduced.tokens.shape[1], seed=2)
    with portable_graph() if portable else nullcontext():
        found = cut_of(rule, before, reduced, PREFIX, fused_tokens).undo(now)
    torch.testing.assert_close(found, LOOPS[rule](before, reduced, now), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", ["copy", "delta"])
def test_merged_tokens_are_given_back(rule: Any) -> None:
    before = tokens_of(3, 30 + PREFIX)
    attention = torch.nn.functional.normalize
    from lightning_prune.reduction import AttentionInputs

    parts = [attention(tokens_of(3, 32, seed, 8), dim=-1).unsqueeze(1) for seed in (3, 4, 5)]
    sequence = TokenSequence(before, PREFIX, True, AttentionInputs(*parts), trace=True)
    reduced = resolve("tome").reduce(sequence, 9)
    now = tokens_of(3, 23, seed=6)
    found = cut_of(rule, before, reduced, PREFIX).undo(now)
    torch.testing.assert_close(found, LOOPS[rule](before, reduced, now), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rules", [("copy", "copy"), ("copy", "delta"), ("delta", "copy"), ("delta", "delta")])
def test_cuts_are_undone_from_the_last_to_the_first(rules: Any) -> None:
    first = tokens_of(2, 30 + PREFIX)
    once = dropped(first, 18)
    second = tokens_of(2, 18 + PREFIX, seed=7)  # what these have become at the second cut
    twice = dropped(second, 7, fused=True)
    now = tokens_of(2, 7 + 1 + PREFIX, seed=8)
    cuts = with_cut((), cut_of(rules[0], first, once, PREFIX))
    cuts = with_cut(cuts, cut_of(rules[1], second, twice, PREFIX))
    assert len(cuts) == (1 if rules == ("copy", "copy") else 2)
    expected = LOOPS[rules[0]](first, once, LOOPS[rules[1]](second, twice, now))
    torch.testing.assert_close(restored(now, cuts), expected, rtol=1e-10, atol=1e-10)


def test_nothing_that_changed_since_the_cut_gives_the_tokens_at_the_cut() -> None:
    before = tokens_of(2, 30 + PREFIX)
    reduced = dropped(before, 11, fused=True)
    assert torch.equal(cut_of("delta", before, reduced, PREFIX).undo(reduced.tokens), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", ["copy", "delta"])
def test_precision_is_that_of_the_tokens(rule: Any, dtype: torch.dtype) -> None:
    before = tokens_of(2, 30 + PREFIX).to(dtype)
    reduced = dropped(before, 14)
    now = tokens_of(2, 14 + PREFIX, seed=2).to(dtype)
    found = cut_of(rule, before, reduced, PREFIX).undo(now)
    assert found.dtype == dtype
    expected = LOOPS[rule](before.double(), reduced._replace(tokens=reduced.tokens.double()), now.double())
    torch.testing.assert_close(
        found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
    )


def test_images_do_not_depend_on_their_batch() -> None:
    before = tokens_of(3, 30 + PREFIX)
    reduced, now = dropped(before, 9, fused=True), tokens_of(3, 9 + 1 + PREFIX, seed=2)
    whole = cut_of("delta", before, reduced, PREFIX).undo(now)
    for b in range(3):
        alone = ReductionOutput(reduced.tokens[b : b + 1], reduced.positions[b : b + 1])
        torch.testing.assert_close(
            cut_of("delta", before[b : b + 1], alone, PREFIX).undo(now[b : b + 1]), whole[b : b + 1]
        )


def test_distances_are_held_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens_of(2, 30 + PREFIX)
    reduced = dropped(before, 12)
    valid = reduced.positions >= PREFIX
    whole = nearest_kept(before[:, PREFIX:], reduced.tokens, valid, PREFIX, 5).sort(dim=-1).values
    monkeypatch.setattr("lightning_prune.patching.restored_tokens._DISTANCES", 2 * 12 * 7)
    shapes: list[int] = []
    smallest = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **k: (shapes.append(x.shape[1]), smallest(x, *a, **k))[1])
    parts = nearest_kept(before[:, PREFIX:], reduced.tokens, valid, PREFIX, 5).sort(dim=-1).values
    assert torch.equal(whole, parts)
    assert shapes == [7, 7, 7, 7, 2]


@pytest.mark.parametrize(("fused_tokens", "looked_at"), [(0, 20), (2, 22), (None, 30)])
def test_neighbours_are_looked_for_of_removed_tokens_only(fused_tokens: int | None, looked_at: int) -> None:
    before = tokens_of(2, 30 + PREFIX)
    cut = cut_of("delta", before, dropped(before, 10), PREFIX, fused_tokens)
    assert isinstance(cut, DeltaCut)
    assert cut.nearest.shape == (2, looked_at, NEIGHBOURS)
    assert cut.before.shape == (2, looked_at, 6)


def test_kept_indices() -> None:
    positions = torch.tensor([[0, 3, -1, 1], [0, -1, -1, 4]])
    expected = torch.tensor([[0, 3, -1, 1, -1], [0, -1, -1, -1, 3]])
    assert torch.equal(kept_indices(positions, 5), expected)
    with portable_graph():
        assert torch.equal(kept_indices(positions, 5), expected)


@pytest.mark.parametrize(("smaller", "grid"), [((2, 3), (4, 5)), ((3, 3), (7, 7)), ((1, 2), (2, 5)), ((4, 4), (4, 4))])
def test_a_grid_is_interpolated_as_torch_does(smaller: tuple[int, int], grid: tuple[int, int]) -> None:
    now = tokens_of(2, PREFIX + smaller[0] * smaller[1])
    rows, columns = (resampling_matrix(*sides) for sides in zip(smaller, grid, strict=True))
    found = GridCut(rows, columns, PREFIX).undo(now)
    picture = now[:, PREFIX:].transpose(1, 2).unflatten(2, smaller)
    expected = torch.nn.functional.interpolate(picture, grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[:, PREFIX:], expected.flatten(2).transpose(1, 2), rtol=1e-6, atol=1e-6)
    assert torch.equal(found[:, :PREFIX], now[:, :PREFIX])


def test_kinds_of_cuts() -> None:
    before = tokens_of(1, 12)
    assert isinstance(cut_of("copy", before, dropped(before, 4), PREFIX), CopyCut)
    assert isinstance(cut_of("delta", before, dropped(before, 4), PREFIX), DeltaCut)
