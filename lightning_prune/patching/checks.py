"""Whether a schedule fits a model and a method, asked before anything is touched."""

from lightning_prune.errors import ScheduleError, UnsupportedModelError
from lightning_prune.keep_rates import KeepRates
from lightning_prune.patching.families import VisionTransformer
from lightning_prune.patching.reduced import too_many
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule


def check_depth(transformer: VisionTransformer, schedule: Schedule | KeepRates) -> None:
    """Raises ScheduleError, naming both, if the schedule is for another number of blocks."""
    if schedule.depth != transformer.depth:
        raise ScheduleError(f"The schedule is for {schedule.depth} blocks; this model has {transformer.depth}.")


def check_schedule(transformer: VisionTransformer, reduction: Reduction, schedule: Schedule | KeepRates) -> None:
    """Raises ScheduleError, naming the numbers, if the schedule does not fit the transformer and the reduction.

    Where the token count depends on the image size, the counts are checked in forward instead.

    Raises:
        ScheduleError: As said.
        UnsupportedModelError: If the reduction needs of the model's attention what it cannot do.
    """
    check_depth(transformer, schedule)
    reducing = schedule.reducing
    if reducing and min(reducing) < transformer.first:
        raise ScheduleError(
            f"Block {min(reducing)} of this {type(transformer.root).__name__} cannot remove tokens, only blocks from "
            f"{transformer.first} on can: {transformer.before_first}."
        )
    if reduction.site == "input" and any(reducing):
        block = next(b for b in reducing if b)
        raise ScheduleError(
            f"{reduction.name} removes tokens before block 0; the schedule asks block {block} for some."
        )
    if reduction.proportional_attention and not transformer.family.weighs:
        raise UnsupportedModelError(
            f"{reduction.name} weighs the attention of later blocks by token sizes, which the attention of this "
            f"{type(transformer.root).__name__} has no place for; use proportional_attention=False or another method."
        )
    if reducing and ("attention" in reduction.reads or reduction.proportional_attention):
        why = transformer.family.unreadable(transformer)
        if why is not None:
            raise UnsupportedModelError(why)
    if transformer.tokens is None:
        return
    if isinstance(schedule, KeepRates):  # resolved for each size by itself, but those of this size can be said now
        schedule = Schedule(schedule.schedule(transformer.tokens, transformer.prefix_tokens).removed)
    made_for = schedule.provenance.get("tokens_dense")
    if made_for not in (None, transformer.tokens):
        raise ScheduleError(f"The schedule was made for {made_for} tokens; {transformer.tokens} enter this model.")
    count = transformer.tokens
    for index, remove in enumerate(schedule.removed):
        capacity = reduction.capacity(count, transformer.prefix_tokens)
        if remove > capacity:
            raise ScheduleError(too_many(index, count, remove, capacity, reduction.name))
        count -= remove
