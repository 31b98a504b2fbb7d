"""The schedules of ToMe: a total, or r a block, shared among blocks of which each can merge half at most."""

from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.schedule import Schedule


def tome_schedule(
    r: int, depth: int, tokens: int, prefix_tokens: int = 1, inflection: float = 0.0, first: int = 0
) -> Schedule:
    """ToMe's schedule (r, inflection): r tokens a block on average.

    Of L blocks the i-th, i from 0, is to merge r (1 + inflection (2 i / (L - 1) - 1)) tokens: r each for inflection 0,
    from 2 r down to 0 for -1, from 0 up to 2 r for 1, and linearly between for others. Whole numbers are found by the
    divisors of Webster and Sainte-Lague, as seats are for votes, so r L tokens go in all; the published code rounds
    each number down, so fewer go. As there, a block that finds too few tokens merges half of the patch tokens that it
    finds, and then fewer than r L go.

    Args:
        r: Tokens that a block merges on average, >= 0.
        depth: Blocks of the model.
        tokens: N, entering block 0, prefix tokens included.
        prefix_tokens: P, which never merge.
        inflection: From -1 to 1.
        first: First block that merges; `depth - first` is L.

    Raises:
        ArgumentError: If an argument is out of its range.

    Source: arXiv 2210.09461, section 4.1, and its schedules in the appendix.

    Example:
        >>> from lightning_prune.reduction import tome_schedule
        >>> tome_schedule(r=8, depth=12, tokens=197).removed
        (8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8)
        >>> tome_schedule(r=8, depth=12, tokens=197, inflection=-1).removed
        (16, 15, 13, 12, 10, 9, 7, 6, 4, 3, 1, 0)
        >>> tome_schedule(r=25, depth=12, tokens=197).removed
        (25, 25, 25, 25, 25, 25, 23, 11, 6, 3, 1, 1)
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 0:
        raise ArgumentError(f"`r` must be a whole number >= 0, got {r!r}.")
    weights = _weights(depth, first, inflection)
    patches = _patches(tokens, prefix_tokens)
    wanted = [0] * len(weights)
    for _ in range(r * len(weights)):
        wanted[_next(weights, wanted)] += 1
    return Schedule([0] * first + _halved(wanted, patches))


def spread_removed(
    remove: int, tokens: int, prefix_tokens: int, depth: int, first: int, inflection: float = 0.0
) -> list[int]:
    """`remove` tokens in all, in the form of `tome_schedule`: the first blocks merge the odd ones more.

    What a block cannot merge, because that were more than half of the patch tokens that it finds, goes in the others,
    by their weights: the schedule is that of the smallest r (in parts of a block) with which `remove` tokens go.

    Args:
        remove: Tokens that go in all.
        tokens: N, entering block 0.
        prefix_tokens: P.
        depth: Number of blocks.
        first: First block that merges.
        inflection: See `tome_schedule`.

    Returns:
        One number a block, `remove` in all.

    Raises:
        ArgumentError: If an argument is out of its range.
        ScheduleError: If `remove` is more than `most_removed`; names the numbers.

    Example:
        >>> from lightning_prune.reduction.tome_schedule import spread_removed
        >>> spread_removed(100, tokens=197, prefix_tokens=1, depth=12, first=0)
        [9, 9, 9, 9, 8, 8, 8, 8, 8, 8, 8, 8]
        >>> spread_removed(190, tokens=197, prefix_tokens=1, depth=12, first=6)
        [0, 0, 0, 0, 0, 0, 50, 50, 48, 24, 12, 6]
    """
    if remove < 0:
        raise ArgumentError(f"`remove` must be at least 0, got {remove!r}.")
    most = most_removed(tokens, prefix_tokens, depth, first, inflection)
    if remove > most:
        raise ScheduleError(
            f"{remove} tokens cannot go: of {tokens}, {prefix_tokens} of them prefix tokens, blocks {first} to "
            f"{depth - 1} can merge at most {most}, half of the patch tokens in a block."
        )
    weights, patches = _weights(depth, first, inflection), _patches(tokens, prefix_tokens)
    wanted = [0] * len(weights)
    for _ in range(remove):
        wanted[_next(weights, wanted)] += 1
    # One more wanted of one block makes one more go in all or, where it finds too few, none: `remove` is met exactly.
    while sum(_halved(wanted, patches)) < remove:
        wanted[_next(weights, wanted)] += 1
    return [0] * first + _halved(wanted, patches)


def most_removed(tokens: int, prefix_tokens: int, depth: int, first: int, inflection: float = 0.0) -> int:
    """The most that `spread_removed` can make go: each block to which its form gives any merges half.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> from lightning_prune.reduction.tome_schedule import most_removed
        >>> most_removed(tokens=197, prefix_tokens=1, depth=12, first=10)
        147
    """
    patches = _patches(tokens, prefix_tokens)
    return sum(_halved([patches if w > 0 else 0 for w in _weights(depth, first, inflection)], patches))


def _halved(wanted: list[int], patches: int) -> list[int]:
    """What blocks merge of which each merges half of the patch tokens that it finds at most."""
    removed = []
    for each in wanted:
        removed.append(min(each, patches // 2))
        patches -= removed[-1]
    return removed


def _next(weights: list[float], wanted: list[int]) -> int:
    """The block that merges the next token: the one that has least for its weight, of several the first."""
    return max(range(len(weights)), key=lambda i: weights[i] / (2 * wanted[i] + 1))


def _weights(depth: int, first: int, inflection: float) -> list[float]:
    if not 0 <= first < depth:
        raise ArgumentError(f"The first block that merges must be an index from 0 to {depth - 1}, got {first!r}.")
    if not -1 <= inflection <= 1:
        raise ArgumentError(f"`inflection` must be from -1 to 1, got {inflection!r}.")
    count = depth - first
    # What the docstring says, times L - 1: whole numbers where the inflection is one, so that ties are ties.
    return [1.0] if count == 1 else [count - 1 + inflection * (2 * i - count + 1) for i in range(count)]


def _patches(tokens: int, prefix_tokens: int) -> int:
    if not 0 <= prefix_tokens <= tokens:
        raise ArgumentError(f"`prefix_tokens` must be from 0 to the {tokens} tokens, got {prefix_tokens!r}.")
    return tokens - prefix_tokens
