"""ToMe: bipartite soft matching, and the distribution of merged tokens over the blocks (arXiv 2210.09461)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune._utils.validation import check, check_between, check_bool, check_choice, check_int
from lightning_prune.errors import ScheduleError
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import is_exported, precise_product
from lightning_prune.reduction.merging import merge, merge_into_targets
from lightning_prune.reduction.portable import descending_ranks, first_index, is_portable, joined, whole_numbers
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
        >>> from lightning_prune.reduction.tome import allocate_tokens
        >>> allocate_tokens(100, tokens=197, num_prefix_tokens=1, depth=12, first=0)
        [9, 9, 9, 9, 8, 8, 8, 8, 8, 8, 8, 8]
        >>> allocate_tokens(190, tokens=197, num_prefix_tokens=1, depth=12, first=6)
        [0, 0, 0, 0, 0, 0, 50, 50, 48, 24, 12, 6]
    """
    check("remove", remove, "an integer >= 0", remove >= 0)
    largest = max_allocatable(tokens, num_prefix_tokens, depth, first, inflection)
    if remove > largest:
        raise ScheduleError(
            f"`remove` must be at most {largest}, which merges half of the patch tokens in each block from {first} on, "
            f"got {remove}."
        )
    weights, patches = _weights(depth, first, inflection), _patches(tokens, num_prefix_tokens)
    wanted = [0] * len(weights)
    for _ in range(remove):
        wanted[_next(weights, wanted)] += 1
    # Each step increases the total by one, or by none if the block has too few tokens, so `remove` is met exactly.
    while sum(_halved(wanted, patches)) < remove:
        wanted[_next(weights, wanted)] += 1
    return [0] * first + _halved(wanted, patches)


def max_allocatable(tokens: int, num_prefix_tokens: int, depth: int, first: int, inflection: float = 0.0) -> int:
    """The largest total that `allocate_tokens` can distribute: each block with a weight > 0 merges half of its tokens.

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


_INFLECTION = {"constant": 0.0, "decreasing": -1.0}


def bipartite_matching(key: Tensor, remove: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: which patch tokens are merged into which (arXiv 2210.09461, section 3).

    Patch tokens are divided alternately into two sets: those at odd indices among them (the second, the fourth, ...)
    are sources, those at even indices are destinations. Each source is matched with the most similar destination, by
    the cosine of their keys averaged over heads, and the R most similar pairs are merged. Prefix tokens are left out.
    The keys are the operands of the dot product: after rotary embedding, and with talking heads (CaiT) the keys of all
    heads concatenated.

    Args:
        key: (B, H, N, D).
        remove: R; at most (N - P) // 2, the number of sources.
        num_prefix_tokens: P.

    Returns:
        (B, R) sources and (B, R) the destination of each, as indices among the N tokens.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.tome import bipartite_matching
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.0]]).view(1, 1, 4, 2)
        >>> bipartite_matching(key, remove=1, num_prefix_tokens=0)
        (tensor([[3]]), tensor([[0]]))
    """
    similarity, destination = _pair_similarity(key, num_prefix_tokens).max(dim=-1)
    source = similarity.topk(remove, dim=-1, sorted=is_exported()).indices  # TensorRT demands a sorted result
    return source * 2 + (num_prefix_tokens + 1), destination.gather(1, source) * 2 + num_prefix_tokens


def matched_targets(key: Tensor, remove: int, num_prefix_tokens: int) -> Tensor:
    """The portable form of `bipartite_matching`; of equally similar pairs the first is merged.

    Args:
        key: (B, H, N, D).
        remove: R.
        num_prefix_tokens: P.

    Returns:
        (B, N) float32, index of the token that each token is merged into; those that are left have their own.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.tome import matched_targets
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.0]]).view(1, 1, 4, 2)
        >>> matched_targets(key, remove=1, num_prefix_tokens=0)
        tensor([[0., 1., 2., 0.]])
    """
    similarity = _pair_similarity(key, num_prefix_tokens)
    batch, tokens = key.shape[0], key.shape[2]
    best = similarity.amax(dim=-1)
    destination = first_index(similarity == best.unsqueeze(-1)) * 2 + num_prefix_tokens
    own = whole_numbers(0, tokens, key)
    even, odd = own[num_prefix_tokens::2], own[num_prefix_tokens + 1 :: 2]
    merged = torch.where(descending_ranks(best) < remove, destination, odd)
    paired = torch.stack((even[: len(odd)].expand(batch, -1), merged), dim=2).flatten(1)
    return joined(own[:num_prefix_tokens].expand(batch, -1), paired, even[len(odd) :].expand(batch, -1))


def _pair_similarity(key: Tensor, num_prefix_tokens: int) -> Tensor:
    """The cosine of the mean keys of each source and each destination, (B, sources, destinations)."""
    # Sum and mean have the same cosine. `sum` with a dtype is a single pass over the keys, and half precision would
    # cause many ties.
    metric = key.sum(dim=1, dtype=torch.promote_types(key.dtype, torch.float32))
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=1e-12)
    odd, even = metric[:, num_prefix_tokens + 1 :: 2], metric[:, num_prefix_tokens::2]
    return precise_product(odd, even.transpose(1, 2))


class ToMe(Reduction):
    """Token Merging, as a method for `lightning_prune.patch`.

    Source: arXiv 2210.09461, sections 3 and 4.1. Differences from the published code: tokens that are left keep their
    order, so that neighbours are in different sets; a merged token keeps the position of its destination, so that
    models with rotary embeddings or position biases can be used; and a schedule removes exactly the requested total.

    Args:
        proportional_attention: Whether later blocks weight tokens by size: log(size) is added to the logits of each
            key. Blocks before the first merge are not affected.
        schedule: How `allocate` distributes a total over the blocks: `"constant"`, the same number in each, or
            `"decreasing"`, linearly from twice the mean in the first block to 0 in the last. It does not affect given
            schedules.

    Raises:
        ArgumentError: If an argument has another value.

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
        check_bool("proportional_attention", proportional_attention)
        check_choice("schedule", schedule, _INFLECTION)
        self.proportional_attention = proportional_attention
        self.schedule = schedule

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Merges the R most similar pairs; see `bipartite_matching` and `merge`."""
        assert sequence.attention is not None  # provided because of `reads`
        tokens, key = sequence.tokens, sequence.attention.key
        if is_portable():
            target = matched_targets(key, remove, sequence.num_prefix_tokens)
            return merge_into_targets(tokens, target, tokens.shape[1] - remove, sequence.sizes, sequence.trace)
        source, destination = bipartite_matching(key, remove, sequence.num_prefix_tokens)
        return merge(tokens, source, destination, sequence.sizes, sequence.trace)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """Half of the patch tokens, the sources."""
        return max(tokens - num_prefix_tokens, 0) // 2

    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        """Distributes the tokens over the blocks from `block` on; see `allocate_tokens`."""
        return allocate_tokens(remove, tokens, num_prefix_tokens, depth, block, _INFLECTION[self.schedule])

    def max_total_removed(self, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> int:
        """The total if each block of the schedule merges half of its patch tokens."""
        return max_allocatable(tokens, num_prefix_tokens, depth, block, _INFLECTION[self.schedule])

    def settings(self) -> dict[str, Any]:
        """`proportional_attention` and `schedule`."""
        return {"proportional_attention": self.proportional_attention, "schedule": self.schedule}
