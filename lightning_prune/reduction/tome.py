"""ToMe: bipartite soft matching, and how its merges are distributed over the blocks (arXiv 2210.09461)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import merge, precise_product
from lightning_prune.schedule import Schedule


def tome_schedule(
    r: int, depth: int, tokens: int, num_prefix_tokens: int = 1, inflection: float = 0.0, first: int = 0
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
        num_prefix_tokens: P, which never merge.
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
    patches = _patches(tokens, num_prefix_tokens)
    wanted = [0] * len(weights)
    for _ in range(r * len(weights)):
        wanted[_next(weights, wanted)] += 1
    return Schedule([0] * first + _halved(wanted, patches))


def allocate_tokens(
    remove: int, tokens: int, num_prefix_tokens: int, depth: int, first: int, inflection: float = 0.0
) -> list[int]:
    """Distributes `remove` tokens over the blocks by the weights of `tome_schedule`; the remainder goes to the first.

    A block merges at most half of its patch tokens; what exceeds that goes to the others by their weights. The schedule
    is that of the smallest r (in parts of a block) that removes `remove` tokens.

    Args:
        remove: Tokens that go in all.
        tokens: N, entering block 0.
        num_prefix_tokens: P.
        depth: Number of blocks.
        first: First block that merges.
        inflection: See `tome_schedule`.

    Returns:
        One number a block, `remove` in all.

    Raises:
        ArgumentError: If an argument is out of its range.
        ScheduleError: If `remove` is more than `max_allocatable`; names the numbers.

    Example:
        >>> from lightning_prune.reduction.tome import allocate_tokens
        >>> allocate_tokens(100, tokens=197, num_prefix_tokens=1, depth=12, first=0)
        [9, 9, 9, 9, 8, 8, 8, 8, 8, 8, 8, 8]
        >>> allocate_tokens(190, tokens=197, num_prefix_tokens=1, depth=12, first=6)
        [0, 0, 0, 0, 0, 0, 50, 50, 48, 24, 12, 6]
    """
    if remove < 0:
        raise ArgumentError(f"`remove` must be at least 0, got {remove!r}.")
    most = max_allocatable(tokens, num_prefix_tokens, depth, first, inflection)
    if remove > most:
        raise ScheduleError(
            f"{remove} tokens cannot go: of {tokens}, {num_prefix_tokens} of them prefix tokens, blocks {first} to "
            f"{depth - 1} can merge at most {most}, half of the patch tokens in a block."
        )
    weights, patches = _weights(depth, first, inflection), _patches(tokens, num_prefix_tokens)
    wanted = [0] * len(weights)
    for _ in range(remove):
        wanted[_next(weights, wanted)] += 1
    # One more wanted of one block makes one more go in all or, where it finds too few, none: `remove` is met exactly.
    while sum(_halved(wanted, patches)) < remove:
        wanted[_next(weights, wanted)] += 1
    return [0] * first + _halved(wanted, patches)


def max_allocatable(tokens: int, num_prefix_tokens: int, depth: int, first: int, inflection: float = 0.0) -> int:
    """The most that `allocate_tokens` can make go: each block to which its form gives any merges half.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> from lightning_prune.reduction.tome import max_allocatable
        >>> max_allocatable(tokens=197, num_prefix_tokens=1, depth=12, first=10)
        147
    """
    patches = _patches(tokens, num_prefix_tokens)
    return sum(_halved([patches if w > 0 else 0 for w in _weights(depth, first, inflection)], patches))


def _halved(wanted: list[int], patches: int) -> list[int]:
    """Tokens that each block merges if none merges more than half of its patch tokens."""
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


def _patches(tokens: int, num_prefix_tokens: int) -> int:
    if not 0 <= num_prefix_tokens <= tokens:
        raise ArgumentError(f"`num_prefix_tokens` must be from 0 to the {tokens} tokens, got {num_prefix_tokens!r}.")
    return tokens - num_prefix_tokens


_INFLECTION = {"constant": 0.0, "decreasing": -1.0}


def bipartite_matching(key: Tensor, remove: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Which patch tokens merge into which: bipartite soft matching (arXiv 2210.09461, section 3).

    Patch tokens alternate between two sets: those at odd places among them (the second, the fourth, ...) may go, those
    at even places may be gone into. Each of the first finds the one of the second that it is most similar to, by the
    cosine of their keys averaged over the heads, and the R most similar pairs merge. Prefix tokens take no part, and of
    an odd number of patch tokens the larger set is that of the destinations. Keys are those that met queries: with
    rotary embeddings turned by them, and in talking heads (CaiT) those of all heads side by side.

    Args:
        key: (B, H, N, D).
        remove: R; at most (N - P) // 2, the size of the first set.
        num_prefix_tokens: P.

    Returns:
        (B, R) tokens that go, and (B, R) the token that each goes into, both as indices among the N.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.tome import bipartite_matching
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.0]]).view(1, 1, 4, 2)
        >>> bipartite_matching(key, remove=1, num_prefix_tokens=0)
        (tensor([[3]]), tensor([[0]]))
    """
    # A cosine does not tell the sum from the mean. With a dtype it is one pass over the keys, and half precision would
    # tie many similarities.
    metric = key.sum(dim=1, dtype=torch.promote_types(key.dtype, torch.float32))
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=1e-12)
    odd, even = metric[:, num_prefix_tokens + 1 :: 2], metric[:, num_prefix_tokens::2]
    likeness, partner = precise_product(odd, even.transpose(1, 2)).max(dim=-1)
    chosen = likeness.topk(remove, dim=-1, sorted=False).indices
    return chosen * 2 + (num_prefix_tokens + 1), partner.gather(1, chosen) * 2 + num_prefix_tokens


class ToMe(Reduction):
    """Token Merging, as a method for `lightning_prune.patch`.

    Source: arXiv 2210.09461, sections 3 and 4.1. Differences from the published code: tokens that are left keep their
    order, so neighbours stay in different sets; a merged token has the place of its destination, so models with rotary
    embeddings or position biases work; and a schedule removes exactly the total that is asked for.

    Args:
        proportional_attention: Whether later blocks weigh a token as many as it was made of: log(size) is added to the
            logits of its key. Blocks before the first merge keep their attention as it is.
        schedule: How `allocate` shares a total among the blocks: `"constant"`, as many in each, or `"decreasing"`,
            linearly from twice the mean in the first block to none in the last. Schedules that are given outright are
            not touched.

    Raises:
        ArgumentError: If an argument is neither of what it may be.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> from lightning_prune.reduction import ToMe, tome_schedule
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> with lp.patch(model, ToMe(), tome_schedule(r=8, depth=12, tokens=197)) as handle:
        ...     handle.schedule.tokens(197)[-1]
        101
    """

    name = "tome"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    tracks_sizes = True
    is_lossless = True
    multi_block = True

    def __init__(
        self, proportional_attention: bool = True, schedule: Literal["constant", "decreasing"] = "constant"
    ) -> None:
        if not isinstance(proportional_attention, bool):
            raise ArgumentError(f"`proportional_attention` must be True or False, got {proportional_attention!r}.")
        if schedule not in tuple(_INFLECTION):  # which asks for no hash: a list is said to be wrong, too
            raise ArgumentError(f"`schedule` must be 'constant' or 'decreasing', got {schedule!r}.")
        self.proportional_attention = proportional_attention
        self.schedule = schedule

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Merges the R most similar pairs; see `bipartite_matching` and `merge`."""
        assert sequence.attention is not None  # the patch provides what `reads` asks for
        source, destination = bipartite_matching(sequence.attention.key, remove, sequence.num_prefix_tokens)
        return merge(sequence.tokens, source, destination, sequence.sizes, sequence.trace)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """Half of the patch tokens: those of the set that may go."""
        return max(tokens - num_prefix_tokens, 0) // 2

    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        """What each block from `block` on merges; none before it. See `allocate_tokens`."""
        return allocate_tokens(remove, tokens, num_prefix_tokens, depth, block, _INFLECTION[self.schedule])

    def max_total_removed(self, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> int:
        """What is gone if each block of the schedule merges half of what it finds."""
        return max_allocatable(tokens, num_prefix_tokens, depth, block, _INFLECTION[self.schedule])

    def settings(self) -> dict[str, Any]:
        """`proportional_attention` and `schedule`."""
        return {"proportional_attention": self.proportional_attention, "schedule": self.schedule}
