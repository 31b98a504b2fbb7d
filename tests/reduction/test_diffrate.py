from itertools import accumulate, pairwise

import pytest
import torch

from helpers import reference as naive
from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.reduction import DiffRateMerge, diffrate_counts
from lightning_prune.reduction.diffrate import TABLES, max_diffrate

from .drawn import check_alone_and_together, draw

PUBLISHED = [(depth, name) for depth, tables in TABLES.items() for name in tables.counts]


def left(remove: int, tokens: int, prefix: int, depth: int, first: int = 0) -> list[int]:
    """The tokens that leave each block."""
    return [tokens - gone for gone in accumulate(diffrate_counts(remove, tokens, prefix, depth, first))]


@pytest.mark.parametrize(("depth", "name"), PUBLISHED)
def test_published_totals_have_the_published_counts(depth: int, name: str) -> None:
    """Up to the last block; where a schedule rises, the lowest count before."""
    tokens, counts = TABLES[depth].tokens, TABLES[depth].counts[name]
    assert len(counts) == depth
    expected = list(accumulate(counts[:-1], min))
    assert left(tokens - expected[-1], tokens, 1, depth) == [*expected, expected[-1]]
    assert max_diffrate(tokens, 1, depth) == tokens - min(min(each[:-1]) for each in TABLES[depth].counts.values())


def test_the_schedule_of_deit_small_at_2_7_gmacs() -> None:
    assert left(152, 197, 1, 12) == [197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 45]


@pytest.mark.parametrize("depth", TABLES)
def test_totals_between_are_interpolated(depth: int) -> None:
    """Every total is met, with the counts between those of the schedules around it."""
    tokens = TABLES[depth].tokens
    tables = [[tokens] * (depth - 1), *(list(accumulate(c[:-1], min)) for c in TABLES[depth].counts.values())]
    for weaker, stronger in pairwise(tables):
        for remove in range(tokens - weaker[-1], tokens - stronger[-1] + 1, 3):
            found = left(remove, tokens, 1, depth)
            assert found[-1] == tokens - remove
            for count, one, other in zip(found, weaker, stronger, strict=False):
                assert min(one, other) <= count <= max(one, other)
    assert diffrate_counts(0, tokens, 1, depth) == [0] * depth


@pytest.mark.parametrize(("tokens", "prefix"), [(17, 1), (26, 0), (198, 2), (1370, 1), (5, 1), (2, 1), (1, 1)])
def test_other_numbers_of_tokens_keep_the_shares(tokens: int, prefix: int) -> None:
    patches, most = tokens - prefix, max_diffrate(tokens, prefix, 12)
    assert most == DiffRateMerge().max_total_removed(tokens, prefix, 12, 0)
    for remove in range(1, most + 1, 1 + most // 50):
        counts = diffrate_counts(remove, tokens, prefix, 12)
        assert (len(counts), sum(counts), counts[-1]) == (12, remove, 0)
        assert min(counts) >= 0
        same = left(round(196 * remove / patches), 197, 1, 12) if 196 * remove % patches == 0 else None
        if same is not None:
            found = left(remove, tokens, prefix, 12)
            assert all(
                abs((a - prefix) / patches - (b - 1) / 196) < 0.5 / patches + 0.5 / 196
                for a, b in zip(found, same, strict=True)
            )
    with pytest.raises(ScheduleError, match=rf"`remove` must be at most {most} of {patches} patch tokens.* got"):
        diffrate_counts(most + 1, tokens, prefix, 12)


def test_the_first_block_removes_those_of_the_blocks_before_it() -> None:
    whole = diffrate_counts(152, 197, 1, 12)
    assert diffrate_counts(152, 197, 1, 12, first=3) == [0, 0, 0, sum(whole[:4]), *whole[4:]]
    assert diffrate_counts(152, 197, 1, 12, first=11) == [0] * 11 + [152]
    assert DiffRateMerge().allocate(152, 197, 1, 12, 3) == diffrate_counts(152, 197, 1, 12, first=3)


def test_a_depth_without_schedules_is_named() -> None:
    """A total cannot be given then, but every given schedule can."""
    assert DiffRateMerge().max_total_removed(197, 1, 6, 0) == 195
    with pytest.raises(ScheduleError, match=r"a model of 6 blocks: .* models of 12, 24 and 32 blocks"):
        DiffRateMerge().allocate(10, 197, 1, 6, 0)


@pytest.mark.parametrize("given", [(-1, 197, 1, 12, 0), (5, 197, 1, 12, 12), (5, 197, 1, 12, -1)])
def test_invalid_arguments_are_rejected(given: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ArgumentError, match=r"`(remove|first)` must be "):
        diffrate_counts(*given)


@pytest.mark.parametrize(("prefix", "class_token"), [(0, False), (1, True), (4, False)])
def test_each_goes_into_the_most_similar_kept_one(prefix: int, class_token: bool) -> None:
    sequence = draw(2, 7, prefix, class_token, trace=True)
    sequence = sequence._replace(sizes=torch.arange(1.0, prefix + 8).double().expand(2, -1))
    attention = sequence.attention
    assert attention is not None
    assert sequence.sizes is not None
    assert DiffRateMerge().max_removed(prefix + 7, prefix) == 6
    for remove in range(1, 7):
        found = DiffRateMerge().reduce(sequence, remove)
        assert found.sizes is not None
        assert found.sources is not None
        for b in range(2):
            key = attention.key[b]
            scores = naive.topk_scores(attention.query[b], key, prefix, class_token)
            rows, places, sizes, sources = naive.nearest(
                sequence.tokens[b], key, scores, remove, prefix, sequence.sizes[b].tolist()
            )
            torch.testing.assert_close(found.tokens[b], rows, rtol=1e-12, atol=1e-13)
            assert found.positions[b].tolist() == places
            assert found.sizes[b].tolist() == sizes
            assert found.sources[b].tolist() == sources


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_alone_and_together(DiffRateMerge())


def test_attributes() -> None:
    method = DiffRateMerge()
    assert (method.name, method.reads, method.multi_block) == ("diffrate-merge", {"attention"}, True)
    assert (method.is_lossless, method.tracks_sizes, method.proportional_attention) == (True, True, True)
    assert method != DiffRateMerge(False)
    assert method.settings() == {"proportional_attention": True}
    with pytest.raises(ArgumentError, match="`proportional_attention` must be True or False, got 3"):
        DiffRateMerge(3)  # type: ignore[arg-type] # wrong on purpose
