"""From the forms in which users give a schedule to the schedule of one model."""

from torch import Tensor

from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.patching.models.base import VisionTransformer
from lightning_prune.reduction import Reduction, resolve, spec_of
from lightning_prune.schedule import KeepRates, MethodSpec, Schedule, ScheduleLike, read_schedule


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
    return reduction.site == "block" and reduction.multi_block


def reducing_block(reduction: Reduction, block: int | float, transformer: VisionTransformer) -> int:
    """The block that `Reduction.spread` starts from.

    It is 0 for methods that act before block 0. For methods that reduce in many blocks it is the first that may: an
    index is taken as it is, and a fraction, which says where to reduce once, means the first block that can.

    Args:
        reduction: The method.
        block: Index or fraction of the depth, as users give it.
        transformer: The Vision Transformer.

    Raises:
        ArgumentError: As `resolve_block`.
    """
    index = resolve_block(block, transformer.depth, transformer.first_prunable_block)
    if reduction.site == "input":
        return 0
    return transformer.first_prunable_block if is_multi_block(reduction) and isinstance(block, float) else index


def allocate_schedule(
    reduction: Reduction, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int
) -> Schedule:
    """The schedule that removes `remove` tokens in all, in the method's usual form.

    Args:
        reduction: The method.
        remove: Tokens removed in all; 0 gives a schedule that removes nothing.
        tokens: N, prefix tokens included.
        num_prefix_tokens: P.
        depth: Number of blocks.
        block: What `reducing_block` returns.

    Raises:
        ArgumentError: If the method allocates another number, or not to all blocks; or if it has no schedules.

    Example:
        >>> from lightning_prune.patching import allocate_schedule
        >>> from lightning_prune.reduction import resolve
        >>> allocate_schedule(resolve("pomt"), remove=56, tokens=197, num_prefix_tokens=1, depth=12, block=3)
        Schedule(depth=12, removed={3: 56})
    """
    refuse_adaptive(reduction)
    if not remove:
        return Schedule([0] * depth)
    removed = reduction.allocate(remove, tokens, num_prefix_tokens, depth, block)
    if len(removed) != depth or sum(removed) != remove:
        raise ArgumentError(
            f"`allocate` of {reduction.name} must return {depth} numbers with the sum {remove}, got {removed!r}."
        )
    return Schedule(removed)


def refuse_adaptive(reduction: Reduction) -> None:
    """Raises ArgumentError for methods whose token count depends on the image: they have no schedules."""
    if reduction.adaptive:
        raise ArgumentError(
            f"`method` must be one whose token count can be chosen, got {reduction.name}, with which it depends on the "
            "image. Patch the model with it as it is, and time it by compare_latency."
        )


def resolve_schedule(
    value: ScheduleLike,
    transformer: VisionTransformer,
    reduction: Reduction,
    block: int | float = 0.25,
    example_inputs: Tensor | None = None,
) -> Schedule | KeepRates:
    """The schedule of a model and a method, from any of the forms in which it can be given.

    Args:
        value: See `lightning_prune.schedule.read_schedule`. A number is brought into the method's usual form: at
            `block`, before block 0, or allocated to many blocks as ToMe does.
        transformer: The Vision Transformer.
        reduction: The method.
        block: The reducing block of methods that reduce once, an index or a fraction of the depth.
        example_inputs: (B, channels, height, width) images to count the tokens of. Needed for a number only, if the
            token count depends on the image size and the method reduces in many blocks.

    Returns:
        The schedule, which says its method.

    Raises:
        ArgumentError: If `value` has none of the forms, or names another method than `reduction`.
        ScheduleError: If it is malformed, or the method cannot remove that many tokens.
        FileFormatError: If it is the path of a file that cannot be read or holds no schedule.

    Example:
        >>> import timm
        >>> from lightning_prune.patching import find_vision_transformer, resolve_schedule
        >>> from lightning_prune.reduction import resolve
        >>> transformer = find_vision_transformer(timm.create_model("vit_tiny_patch16_224", depth=4))
        >>> resolve_schedule(56, transformer, resolve("pomt"))
        Schedule(depth=4, removed={1: 56}, method='pomt')
        >>> resolve_schedule(0.5, transformer, resolve("tome")).schedule(197).removed
        (25, 25, 24, 24)
    """
    refuse_adaptive(reduction)
    found = read_schedule(value)
    if isinstance(found, int | float):
        found = _usual_form(found, transformer, reduction, block, example_inputs)
    check_named_method(found, reduction)
    return found.with_method(spec_of(reduction))


def check_named_method(schedule: Schedule | KeepRates, reduction: Reduction) -> None:
    """Raises ArgumentError if the schedule names another method than `reduction`, or several."""
    if isinstance(schedule.method, tuple):
        named = ", ".join(sorted({str(spec) for spec in schedule.methods.values()}))
        raise ArgumentError(
            f"`method` must be left out with a schedule of several methods ({named}), got {spec_of(reduction)}."
        )
    if schedule.method is None or schedule.method == spec_of(reduction):
        return
    if resolve(schedule.method) != reduction:
        raise ArgumentError(f"`method` must be that of the schedule, {schedule.method}, got {spec_of(reduction)}.")


def _usual_form(
    amount: int | float,
    transformer: VisionTransformer,
    reduction: Reduction,
    block: int | float,
    example_inputs: Tensor | None,
) -> Schedule | KeepRates:
    index, depth, prefix = (
        reducing_block(reduction, block, transformer),
        transformer.depth,
        transformer.num_prefix_tokens,
    )
    if not is_multi_block(reduction):
        if isinstance(amount, int):
            return Schedule.single(depth, index, amount)
        return KeepRates.single(depth, index, amount)
    n = transformer.num_tokens
    if n is None:
        if example_inputs is None:
            raise ScheduleError(
                f"`schedule` must be a Schedule or KeepRates, got {amount}: the token count of this model depends on "
                f"the image size, so that {reduction.name} cannot allocate a number of tokens to its blocks."
            )
        n = transformer.count_tokens(example_inputs)
    share = KeepRates.single(depth, index, amount).schedule(n, prefix).total_removed if amount < 1 and amount else None
    remove = int(amount) if share is None else share
    most = reduction.max_total_removed(n, prefix, depth, index)
    if remove > most:
        raise ScheduleError(
            f"{reduction.name} is asked to remove {remove} tokens in all, but of the {n} that enter it can remove at "
            f"most {most}."
        )
    counts = allocate_schedule(reduction, remove, n, prefix, depth, index)
    return counts if share is None else KeepRates.of(counts, n, prefix)


def reductions_of(schedule: Schedule | KeepRates) -> Reduction | dict[int, Reduction]:
    """The method that a schedule names: one reduction, or one for each reducing block where they differ.

    Raises:
        ArgumentError: If the schedule names none, or one that does not exist.
    """
    if isinstance(schedule.method, MethodSpec):
        return resolve(schedule.method)
    if schedule.method is None:
        raise ArgumentError(
            f"`method` must be given with a schedule that does not name one, got {schedule!r}; for example "
            'lp.patch(model, "tome", schedule).'
        )
    return {block: resolve(spec) for block, spec in schedule.methods.items()}
