"""How methods that merge in many blocks distribute the merged tokens over the blocks."""

from lightning_prune._utils.validation import check, check_between, check_int
from lightning_prune.errors import ScheduleError
from lightning_prune.schedule import Schedule


def tome_schedule(
    r: int, depth: int, tokens: int, num_prefix_tokens: int = 1, inflection: float = 0.0, first: int = 0
) -> Schedule:
    """ToMe's schedule (r, inflection): r tokens per block on average.

    Block i (from 0) of L merges r (1 + inflection (2 i / (L - 1) - 1)) tokens: r in every block for inflection 0, from
    2 r down to 0 for -1, from 0 up to 2 r for 1. The numbers are rounded by the Webster (Sainte-Lague) method, which is
    used to allocate seats to votes, so that r L tokens are merged in total. The published code rounds every number
    down, so it merges fewer. As there, a block that has too few tokens merges half of its patch tokens, and the total
    is then less than r L.

    Args:
        r: Average number of tokens that a block merges, >= 0.
        depth: Number of blocks of the model.
        tokens: N, tokens that enter block 0, prefix tokens included.
        num_prefix_tokens: P, which are never merged.
        inflection: Slope of the schedule, in [-1, 1].
        first: Index of the first block that merges; L is `depth - first`.

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
    check_int("r", r, 0)
    weights = _weights(depth, first, inflection)
    patches = _patches(tokens, num_prefix_tokens)
    wanted = [0] * len(weights)
    for _ in range(r * len(weights)):
        wanted[_next(weights, wanted)] += 1
    return Schedule([0] * first + _halved(wanted, patches))


def allocate_tokens(
    remove: int, tokens: int, num_prefix_tokens: int, depth: int, first: int, inflection: float = 0.0
) -> list[int]:
    """Distributes `remove` tokens over the blocks by the weights of `tome_schedule`; the first get the remainder.

    A block merges at most half of its patch tokens. What exceeds this is distributed to the other blocks by their
    weights.

    Args:
        remove: Total number of tokens to merge.
        tokens: N, tokens that enter block 0.
        num_prefix_tokens: P.
        depth: Number of blocks.
        first: Index of the first block that merges.
        inflection: See `tome_schedule`.

    Returns:
        The number for each block, with the sum `remove`.

    Raises:
        ArgumentError: If an argument is out of its range.
        ScheduleError: If `remove` is more than `max_allocatable`.

    Example:
        >>> from lightning_prune.reduction.merge_schedule import allocate_tokens
        >>> allocate_tokens(100, tokens=197, num_prefix_tokens=1, depth=12, first=0)
        [9, 9, 9, 9, 8, 8, 8, 8, 8, 8, 8, 8]
        >>> allocate_tokens(190, tokens=197, num_prefix_tokens=1, depth=12, first=6)
        [0, 0, 0, 0, 0, 0, 50, 50, 48, 24, 12, 6]
    """
    weights, patches = _weights(depth, first, inflection), _patches(tokens, num_prefix_tokens)
    return [0] * first + _distributed(remove, weights, patches)


def allocate_by_rate(remove: int, tokens: int, num_prefix_tokens: int, depth: int, first: int) -> list[int]:
    """Distributes `remove` tokens so that each block from `first` on keeps the same share of its patch tokens.

    The numbers fall with the tokens that are left. A block merges at most half of its patch tokens; what exceeds this
    is distributed to the other blocks.

    Args:
        remove: Total number of tokens to merge.
        tokens: N, tokens that enter block 0.
        num_prefix_tokens: P.
        depth: Number of blocks.
        first: Index of the first block that merges.

    Returns:
        The number for each block, with the sum `remove`.

    Raises:
        ArgumentError: If an argument is out of its range.
        ScheduleError: If `remove` is more than `max_allocatable`.

    Source: the published code of PiToMe (arXiv 2405.16148), which keeps a ratio of the tokens of each block.

    Example:
        >>> from lightning_prune.reduction.merge_schedule import allocate_by_rate
        >>> allocate_by_rate(100, tokens=197, num_prefix_tokens=1, depth=12, first=0)
        [11, 11, 10, 10, 9, 8, 8, 7, 7, 7, 6, 6]
    """
    count, patches = len(_weights(depth, first, 0.0)), _patches(tokens, num_prefix_tokens)
    rate = (max(patches - remove, 1) / max(patches, 1)) ** (1 / count)
    return [0] * first + _distributed(remove, [rate**index for index in range(count)], patches)


def max_allocatable(tokens: int, num_prefix_tokens: int, depth: int, first: int, inflection: float = 0.0) -> int:
    """The largest total that `allocate_tokens` can distribute: each block with a weight > 0 merges half of its tokens.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> from lightning_prune.reduction.merge_schedule import max_allocatable
        >>> max_allocatable(tokens=197, num_prefix_tokens=1, depth=12, first=10)
        147
    """
    return _largest(_weights(depth, first, inflection), _patches(tokens, num_prefix_tokens))


def _distributed(remove: int, weights: list[float], patches: int) -> list[int]:
    """The numbers of the blocks that merge, in proportion to the weights, each at most half of the patch tokens."""
    check("remove", remove, "an integer >= 0", remove >= 0)
    largest = _largest(weights, patches)
    if remove > largest:
        raise ScheduleError(
            f"`remove` must be at most {largest}, which merges half of the patch tokens in each of the last "
            f"{len(weights)} blocks, got {remove}."
        )
    wanted = [0] * len(weights)
    for _ in range(remove):
        wanted[_next(weights, wanted)] += 1
    # Each step increases the total by one, or by none if the block has too few tokens, so `remove` is met exactly.
    while sum(_halved(wanted, patches)) < remove:
        wanted[_next(weights, wanted)] += 1
    return _halved(wanted, patches)


def _largest(weights: list[float], patches: int) -> int:
    return sum(_halved([patches if weight > 0 else 0 for weight in weights], patches))


def _halved(wanted: list[int], patches: int) -> list[int]:
    """Limits each number to half of the patch tokens that enter the block."""
    removed = []
    for each in wanted:
        removed.append(min(each, patches // 2))
        patches -= removed[-1]
    return removed


def _next(weights: list[float], wanted: list[int]) -> int:
    """The block that gets the next token: the one with the fewest relative to its weight; ties go to the first."""
    return max(range(len(weights)), key=lambda i: weights[i] / (2 * wanted[i] + 1))


def _weights(depth: int, first: int, inflection: float) -> list[float]:
    check("first", first, f"a block index from 0 to {depth - 1}", 0 <= first < depth)
    check_between("inflection", inflection, -1, 1)
    count = depth - first
    # The formula of `tome_schedule` times L - 1: integers for an integer inflection, so that ties are exact.
    return [1.0] if count == 1 else [count - 1 + inflection * (2 * i - count + 1) for i in range(count)]


def _patches(tokens: int, num_prefix_tokens: int) -> int:
    expected = f"an integer in [0, {tokens}], the number of tokens"
    check("num_prefix_tokens", num_prefix_tokens, expected, 0 <= num_prefix_tokens <= tokens)
    return tokens - num_prefix_tokens
