"""POMT with `dropped="nearest"`, which merges the tokens that it does not keep."""

from typing import Any

import pytest
import torch

from helpers import reference as naive
from lightning_prune.errors import ArgumentError
from lightning_prune.reduction import POMT, merge_into_nearest, pomt_reduce, pomt_scores

from .drawn import PRECISIONS, check_alone_and_together, check_one_graph, draw

METHOD = POMT(dropped="nearest")


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("weighed", [False, True], ids=["first", "later"])
def test_every_remove_matches_the_reference(prefix: int, batch: int, weighed: bool) -> None:
    sequence = draw(batch, 7, prefix, trace=True)
    if weighed:
        sizes = torch.randint(1, 9, (batch, prefix + 7), generator=torch.Generator().manual_seed(3)).double()
        sequence = sequence._replace(sizes=sizes)
    attention = sequence.attention
    assert attention is not None
    max_removed = METHOD.max_removed(prefix + 7, prefix)
    assert max_removed == 6
    for b in range(batch):
        scores = naive.pomt_scores(attention.query[b], attention.key[b], attention.value[b], prefix)
        known = None if sequence.sizes is None else sequence.sizes[b].tolist()
        for remove in range(1, max_removed + 1):
            reduced = METHOD.reduce(sequence, remove)
            assert reduced.sizes is not None
            assert reduced.sources is not None
            left, positions, weights, sources = naive.nearest(
                sequence.tokens[b], attention.key[b], scores, remove, prefix, known
            )
            assert reduced.positions[b].tolist() == positions
            assert reduced.sources[b].tolist() == sources
            assert reduced.sizes[b].tolist() == weights
            torch.testing.assert_close(reduced.tokens[b], left, rtol=1e-12, atol=1e-13)
            for k in range(prefix + 7 - remove):
                if sources.count(k) == 1:
                    assert torch.equal(reduced.tokens[b, k], sequence.tokens[b, positions[k]]), "it keeps its bits"


def test_autocast_does_not_change_the_matching() -> None:
    """With nearly equal keys, whose similarities would be equal in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    key = 1 + 0.05 * torch.randn(2, 3, 31, 8, generator=generator)
    tokens, scores = torch.randn(2, 31, 6, generator=generator), torch.randn(2, 30, generator=generator)
    expected = merge_into_nearest(tokens, key, scores, 20, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = merge_into_nearest(tokens, key, scores, 20, 1)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_lower_precision_matches_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """The reference uses the actual pairs, because bfloat16 may rank near-ties differently."""
    sequence = draw(patches=30, dtype=dtype, trace=True)
    reduced = METHOD.reduce(sequence, 20)
    assert reduced.tokens.dtype == dtype
    assert reduced.sizes is not None
    assert reduced.sources is not None
    assert reduced.sizes.dtype == torch.float32
    for b in range(3):
        groups = [(reduced.sources[b] == k).nonzero()[:, 0] for k in range(11)]
        assert [len(group) for group in groups] == reduced.sizes[b].tolist()
        expected = torch.stack([sequence.tokens[b, group].double().mean(0) for group in groups])
        torch.testing.assert_close(reduced.tokens[b].double(), expected, rtol=tolerance, atol=tolerance)


def test_prefix_tokens_receive_nothing() -> None:
    """Even if a prefix token has the same key as a patch."""
    sequence = draw(2, 9, trace=True)
    attention = sequence.attention
    assert attention is not None
    key = attention.key.clone()
    key[:, :, 0] = key[:, :, 5]
    reduced = METHOD.reduce(sequence._replace(attention=attention._replace(key=key)), 7)
    assert reduced.sizes is not None
    assert reduced.sizes[:, 0].tolist() == [1, 1]
    assert torch.equal(reduced.tokens[:, 0], sequence.tokens[:, 0])


def test_equal_scores_keep_all_tokens() -> None:
    sequence = draw(2, 20)
    attention = sequence.attention
    assert attention is not None
    for remove in (1, 10, 19):
        merged = merge_into_nearest(sequence.tokens, attention.key, torch.zeros(2, 20), remove, 1)
        assert merged.sizes is not None
        assert merged.sizes.sum(1).tolist() == [21, 21]
        assert merged.positions.diff(dim=1).min() > 0


def test_the_norm_of_keys_has_no_effect() -> None:
    sequence = draw(2, 20, trace=True)
    attention = sequence.attention
    assert attention is not None
    lengths = torch.linspace(0.1, 10, 21, dtype=torch.float64).view(1, 1, 21, 1)
    scores = pomt_scores(attention, 1)
    one = merge_into_nearest(sequence.tokens, attention.key, scores, 12, 1, trace=True)
    other = merge_into_nearest(sequence.tokens, attention.key * lengths, scores, 12, 1, trace=True)
    assert one.sources is not None
    assert other.sources is not None
    assert torch.equal(one.sources, other.sources)


def test_sources_are_none_without_trace() -> None:
    assert METHOD.reduce(draw(), 4).sources is None


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_alone_and_together(METHOD)


def test_compiles_and_exports_as_one_graph() -> None:
    check_one_graph(METHOD)


@pytest.mark.parametrize(("tokens", "prefix", "max_removed"), [(197, 1, 195), (2, 1, 0), (1, 1, 0), (4, 0, 3)])
def test_max_removed(tokens: int, prefix: int, max_removed: int) -> None:
    assert METHOD.max_removed(tokens, prefix) == max_removed


def test_attributes() -> None:
    assert (METHOD.name, METHOD.is_lossless, METHOD.tracks_sizes, METHOD.proportional_attention) == (
        "pomt-nearest",
        True,
        True,
        True,
    )
    assert POMT("nearest", proportional_attention=False).proportional_attention is False
    mean = POMT("mean")
    assert (mean.name, mean.is_lossless, mean.tracks_sizes, mean.proportional_attention) == (
        "pomt",
        False,
        False,
        False,
    )
    assert POMT.name == "pomt"
    assert mean == POMT()
    assert mean != METHOD
    assert POMT("nearest", False) != METHOD


def test_mean_is_the_default_and_matches_the_paper() -> None:
    sequence = draw(dtype=torch.float32)
    assert sequence.attention is not None
    expected = pomt_reduce(sequence.tokens, sequence.attention, 4, 1)
    reduced = POMT(dropped="mean").reduce(sequence, 4)
    assert torch.equal(reduced.tokens, expected.tokens)
    assert reduced.sizes is None


@pytest.mark.parametrize("dropped", ["none", None, 3, ""])
def test_invalid_dropped_is_rejected(dropped: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`dropped` must be 'mean' or 'nearest', got "):
        POMT(dropped=dropped)


@pytest.mark.parametrize("weighed", ["yes", None, 1])
def test_invalid_proportional_attention_is_rejected(weighed: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`proportional_attention` must be True or False, got "):
        POMT("nearest", proportional_attention=weighed)
