"""From a number of tokens to a schedule, in the form that a method is used in."""

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule


def resolve_block(block: int | float, depth: int, first: int = 0) -> int:
    """The index of a block given as an index or as a fraction of the depth: 0.25 of 12 is block 3.

    Args:
        block: Index or fraction.
        depth: Number of blocks.
        first: The first block that can reduce; a fraction that falls before it means this one.

    Raises:
        ArgumentError: If it is neither an index from 0 to depth - 1 nor a fraction in [0, 1).
    """
    if isinstance(block, float) and 0 <= block < 1:
        return max(int(block * depth), first)
    if isinstance(block, int) and not isinstance(block, bool) and 0 <= block < depth:
        return block
    raise ArgumentError(f"`block` must be an index from 0 to {depth - 1} or a fraction in [0, 1), got {block!r}.")


def is_multi_block(reduction: Reduction) -> bool:
    """Whether a method is used in many blocks, as ToMe is, and not in one as POMT is."""
    return reduction.site == "block" and type(reduction).spread is not Reduction.spread


def reducing_block(reduction: Reduction, block: int | float, transformer: VisionTransformer) -> int:
    """The block that `Reduction.spread` wants to be told.

    Of methods that act before block 0 it is 0. Of those that reduce in many blocks it is the first that may: an index
    is taken as it is, and a fraction, which says where to reduce once, means the first block that can.

    Args:
        reduction: The method.
        block: Index or fraction of the depth, as users give it.
        transformer: The Vision Transformer.

    Raises:
        ArgumentError: As `resolve_block`.
    """
    index = resolve_block(block, transformer.depth, transformer.first)
    if reduction.site == "input":
        return 0
    return transformer.first if is_multi_block(reduction) and isinstance(block, float) else index


def spread_schedule(
    reduction: Reduction, remove: int, tokens: int, prefix_tokens: int, depth: int, block: int
) -> Schedule:
    """The schedule that makes `remove` tokens go, as the method spreads them over the blocks.

    Args:
        reduction: The method.
        remove: Tokens that go in all; 0 gives a schedule that removes nothing.
        tokens: N.
        prefix_tokens: P.
        depth: Number of blocks.
        block: What `reducing_block` says.

    Raises:
        ArgumentError: If the method spreads another number, or not over all blocks; or if it has no schedules.

    Example:
        >>> from lightning_prune.profiling import spread_schedule
        >>> from lightning_prune.reduction import resolve
        >>> spread_schedule(resolve("pomt"), remove=56, tokens=197, prefix_tokens=1, depth=12, block=3)
        Schedule(depth=12, removed={3: 56})
    """
    refuse_adaptive(reduction)
    if not remove:
        return Schedule([0] * depth)
    removed = reduction.spread(remove, tokens, prefix_tokens, depth, block)
    if len(removed) != depth or sum(removed) != remove:
        raise ArgumentError(
            f"`spread` of {reduction.name} must make {remove} tokens go in {depth} blocks, got {removed!r}."
        )
    return Schedule(removed)


def refuse_adaptive(reduction: Reduction) -> None:
    """Raises ArgumentError for methods of which the image decides how many tokens go: they have no counts to plan."""
    if reduction.adaptive:
        raise ArgumentError(
            f"`method` must be one whose token count can be chosen; with {reduction.name} the image decides how many "
            "tokens go. Patch the model with it as it is, and time it by compare_latency."
        )
