from typing import Any

import pytest

from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.reduction import ToMe, tome_schedule
from lightning_prune.reduction.merge_schedule import allocate_tokens, max_allocatable

SHAPES = [(197, 1, 12, 0), (197, 1, 12, 3), (20, 0, 4, 0), (33, 2, 5, 2), (9, 5, 3, 0), (30, 1, 4, 3), (3, 1, 2, 0)]


def fits(removed: list[int], tokens: int, prefix: int) -> bool:
    """Whether each block merges at most half of its patch tokens."""
    patches = tokens - prefix
    for each in removed:
        if not 0 <= each <= patches // 2:
            return False
        patches -= each
    return True


@pytest.mark.parametrize("inflection", [0, -1, 1, 0.3])
@pytest.mark.parametrize(("tokens", "prefix", "depth", "first"), SHAPES)
def test_every_total_is_met_exactly(tokens: int, prefix: int, depth: int, first: int, inflection: float) -> None:
    most = max_allocatable(tokens, prefix, depth, first, inflection)
    for remove in range(most + 1):
        removed = allocate_tokens(remove, tokens, prefix, depth, first, inflection)
        assert len(removed) == depth
        assert sum(removed) == remove
        assert not any(removed[:first])
        assert fits(removed, tokens, prefix)
    with pytest.raises(ScheduleError, match=rf"`remove` must be at most {most}, .* got {most + 1}\."):
        allocate_tokens(most + 1, tokens, prefix, depth, first, inflection)


def test_the_largest_total_is_half_in_every_block() -> None:
    assert max_allocatable(197, 1, 12, 0) == 195
    assert max_allocatable(197, 1, 12, 11) == 98
    assert max_allocatable(197, 1, 12, 10) == 98 + 49
    assert max_allocatable(197, 1, 12, 10, inflection=-1) == 98, "the last block of a decreasing schedule merges none"
    assert max_allocatable(197, 1, 12, 10, inflection=1) == 98, "as the first of an increasing one"
    assert max_allocatable(197, 1, 12, 11, inflection=-1) == 98, "but one block alone is no ramp"
    assert max_allocatable(2, 1, 12, 0) == 0


@pytest.mark.parametrize("remove", [96, 100, 131, 7])
def test_constant_distributes_evenly_with_the_remainder_first(remove: int) -> None:
    low, odd = divmod(remove, 12)
    assert allocate_tokens(remove, 197, 1, 12, 0) == [low + 1] * odd + [low] * (12 - odd)
    low, odd = divmod(remove, 9)
    assert allocate_tokens(remove, 197, 1, 12, 3) == [0] * 3 + [low + 1] * odd + [low] * (9 - odd)


def test_excess_over_half_is_merged_in_other_blocks() -> None:
    """With 30 in each, 46 tokens would enter the last block, which can merge only half of them."""
    assert allocate_tokens(180, 197, 1, 6, 0) == [33, 33, 33, 33, 32, 16]


@pytest.mark.parametrize("depth", [2, 5, 12, 24])
@pytest.mark.parametrize("inflection", [-1.0, -0.5, 0.25, 1.0])
def test_r_and_inflection_give_a_linear_schedule(depth: int, inflection: float) -> None:
    r = 7
    removed = tome_schedule(r, depth, 2000, 1, inflection).removed
    assert sum(removed) == r * depth
    for i, found in enumerate(removed):
        wanted = r * (1 + inflection * (2 * i / (depth - 1) - 1))
        assert abs(found - wanted) < 1, "rounded up or down"


def test_constant_r_is_limited_to_half_as_in_the_paper() -> None:
    assert tome_schedule(8, 12, 197).removed == (8,) * 12
    assert tome_schedule(0, 3, 197).removed == (0, 0, 0)
    assert tome_schedule(8, 4, 197, first=2).removed == (0, 0, 8, 8)
    assert tome_schedule(16, 12, 197).removed == (16,) * 11 + (10,), "20 patches are left for the last"
    assert tome_schedule(4, 4, 9, num_prefix_tokens=0).removed == (4, 2, 1, 1)
    assert tome_schedule(4, 4, 9, num_prefix_tokens=2).removed == (3, 2, 1, 0)
    assert tome_schedule(8, 12, 197, inflection=-1).tokens(197)[-1] == 101


def test_the_class_allocates_by_its_schedule() -> None:
    where = {"tokens": 197, "num_prefix_tokens": 1, "depth": 12, "block": 2}
    constant, decreasing = ToMe().allocate(60, **where), ToMe(schedule="decreasing").allocate(60, **where)
    assert constant == [0, 0, *[6] * 10]
    assert decreasing[2] == 12
    assert decreasing[-1] == 0
    assert decreasing[2:] == sorted(decreasing[2:], reverse=True)
    assert sum(decreasing) == 60
    assert ToMe().max_total_removed(**where) == 195
    assert ToMe(schedule="decreasing").max_total_removed(197, 1, 3, 1) == 98
    assert ToMe().allocate(0, **where) == [0] * 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tome_schedule(-1, 12, 197), "`r` must be an integer >= 0, got -1"),
        (lambda: tome_schedule(*[2.5, 12, 197]), "`r` must be an integer >= 0, got 2.5"),
        (lambda: tome_schedule(8, 12, 197, inflection=1.5), "`inflection` must be a number in \\[-1, 1\\], got 1.5"),
        (
            lambda: tome_schedule(8, 12, 197, inflection=float("nan")),
            "`inflection` must .* got nan",
        ),
        (lambda: tome_schedule(8, 12, 197, first=12), "`first` must be a block index from 0 to 11, got 12"),
        (lambda: tome_schedule(8, 12, 1, 2), "`num_prefix_tokens` must be .*1.*, got 2"),
        (lambda: ToMe().allocate(-1, 197, 1, 12, 0), "`remove` must be an integer >= 0, got -1"),
        (lambda: ToMe().allocate(8, 197, 1, 12, -1), "`first` must be a block index from 0 to 11, got -1"),
        (lambda: ToMe().max_total_removed(197, 1, 12, 12), "`first` must be a block index from 0 to 11, got 12"),
    ],
)
def test_invalid_arguments_are_rejected(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
