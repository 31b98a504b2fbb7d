"""Whether a schedule fits a model and a method, asked before anything is touched."""

from collections.abc import Mapping

from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.patching.models import VisionTransformer
from lightning_prune.patching.patched_block import too_many
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import KeepRates, Schedule


def check_depth(transformer: VisionTransformer, schedule: Schedule | KeepRates) -> None:
    """Raises ScheduleError, naming both, if the schedule is for another number of blocks."""
    if schedule.depth != transformer.depth:
        raise ScheduleError(f"The schedule is for {schedule.depth} blocks; this model has {transformer.depth}.")


def check_reduction(transformer: VisionTransformer, reduction: Reduction, at: int | None, reads: bool = True) -> None:
    """Raises if the reduction cannot work in this transformer, whatever the numbers.

    Args:
        transformer: The transformer.
        reduction: The method.
        at: The first block that is to reduce; None for the first that can.
        reads: Whether any block will.

    Raises:
        ScheduleError: If that block cannot remove tokens.
        UnsupportedModelError: If the reduction needs of the model what it cannot do.
        ArgumentError: If the reduction was made for another model.
    """
    kind = type(transformer.root).__name__
    if at is not None and at < transformer.first_prunable_block:
        raise ScheduleError(
            f"Block {at} of this {kind} cannot remove tokens, only blocks from {transformer.first_prunable_block} on "
            f"can: {transformer.first_prunable_reason}."
        )
    if reduction.proportional_attention and not transformer.adapter.supports_key_bias:
        raise UnsupportedModelError(
            f"{reduction.name} weighs the attention of later blocks by token sizes, which the attention of this "
            f"{kind} has no place for; use proportional_attention=False or another method."
        )
    if reduction.adaptive and transformer.pools_patches and not reduction.is_lossless:
        raise UnsupportedModelError(
            f"{reduction.name} pads images that are left with fewer tokens than others of their batch, and this {kind} "
            "pools over its patch tokens, padding included; it needs a model that reads its CLS token."
        )
    if reads and ("attention" in reduction.reads or reduction.proportional_attention):
        why = transformer.adapter.attention_unsupported_reason(transformer)
        if why is not None:
            raise UnsupportedModelError(why)
    why = reduction.unsupported_reason(transformer.root) if reads else None
    if why is not None:
        raise ArgumentError(why)


def check_schedule(
    transformer: VisionTransformer, reduction: Reduction | Mapping[int, Reduction], schedule: Schedule | KeepRates
) -> None:
    """Raises ScheduleError, naming the numbers, if the schedule does not fit the transformer and the reduction.

    Where the token count depends on the image size, the counts are checked in forward instead.

    Args:
        transformer: The transformer.
        reduction: The method, or that of each reducing block.
        schedule: What the blocks remove.

    Raises:
        ScheduleError: As said.
        UnsupportedModelError: If the reduction needs of the model's attention what it cannot do.
    """
    check_depth(transformer, schedule)
    reducing = schedule.reducing
    if isinstance(reduction, Reduction):
        check_reduction(transformer, reduction, min(reducing) if reducing else None, bool(reducing))
        reductions = dict.fromkeys(reducing, reduction)
    else:
        reductions = dict(reduction)
        _check_mixed(transformer, reductions)
    for block, each in reductions.items():
        if each.site == "input" and block:
            raise ScheduleError(f"{each.name} removes tokens before block 0; the schedule asks block {block} for some.")
    if transformer.num_tokens is None:
        return
    if isinstance(schedule, KeepRates):  # resolved for each size by itself, but those of this size can be said now
        schedule = schedule.schedule(transformer.num_tokens, transformer.num_prefix_tokens)
    count = transformer.num_tokens
    for index, remove in schedule.reducing.items():
        max_removed = reductions[index].max_removed(count, transformer.num_prefix_tokens)
        if remove > max_removed:
            raise ScheduleError(too_many(index, count, remove, max_removed, reductions[index].name))
        count -= remove


def _check_mixed(transformer: VisionTransformer, reductions: Mapping[int, Reduction]) -> None:
    for block, reduction in reductions.items():
        if reduction.adaptive:
            raise ArgumentError(
                f"`method` must hold methods whose token count can be chosen, got {reduction.name} for block {block}."
            )
        check_reduction(transformer, reduction, block)
    lossless = {reduction.is_lossless for reduction in reductions.values()}
    if transformer.pools_patches and len(lossless) > 1:
        raise UnsupportedModelError(
            f"This {type(transformer.root).__name__} pools over its patch tokens, so that methods that merge tokens "
            "cannot be combined with methods that drop them."
        )
