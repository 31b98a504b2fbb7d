"""Converts the forms in which users can give a schedule to the schedule of a model."""

from torch import Tensor

from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.patching.models.base import VisionTransformer
from lightning_prune.reduction import Reduction, resolve, spec_of
from lightning_prune.reduction.resize import largest_grid
from lightning_prune.schedule import KeepRates, MethodSpec, Schedule, ScheduleLike, read_schedule


def resolve_block(block: int | float, depth: int, first: int = 0) -> int:
    """The index of a block that is given as an index or as a fraction of the depth: 0.25 of 12 is block 3.

    Args:
        block: Index or fraction.
        depth: Number of blocks.
        first: The first block that can reduce, and the smallest result for a fraction.

    Raises:
        ArgumentError: If it is neither an index from 0 to depth - 1 nor a fraction in [0, 1).
    """
    if isinstance(block, float) and 0 <= block < 1:
        return max(int(block * depth), first)
    if isinstance(block, int) and not isinstance(block, bool) and 0 <= block < depth:
        return block
    raise ArgumentError(f"`block` must be an index from 0 to {depth - 1} or a fraction in [0, 1), got {block!r}.")


def is_multi_block(reduction: Reduction) -> bool:
    """Whether a method is used in many blocks, such as ToMe, and not in one, such as POMT."""
    return reduction.site == "block" and reduction.multi_block


def reducing_block(reduction: Reduction, block: int | float, transformer: VisionTransformer) -> int:
    """The `block` argument of `Reduction.allocate`.

    It is 0 for methods that act before block 0. For methods that reduce in many blocks an index is the first of them,
    and a fraction selects the first block that can reduce.

    Args:
        reduction: The method.
        block: Index or fraction of the depth, as given by users.
        transformer: The Vision Transformer.

    Raises:
        ArgumentError: See `resolve_block`.
    """
    index = resolve_block(block, transformer.depth, transformer.first_prunable_block)
    if reduction.site == "input":
        return 0
    return transformer.first_prunable_block if is_multi_block(reduction) and isinstance(block, float) else index


def allocate_schedule(
    reduction: Reduction, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int
) -> Schedule:
    """The schedule that removes `remove` tokens in total, distributed as the method is usually used.

    Args:
        reduction: The method.
        remove: Total number of tokens to remove; 0 gives a schedule that removes nothing.
        tokens: N, prefix tokens included.
        num_prefix_tokens: P.
        depth: Number of blocks.
        block: As returned by `reducing_block`.

    Raises:
        ArgumentError: If the method has no schedules, or its `allocate` returns another depth or total.

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
    """Raises ArgumentError for methods whose number of tokens depends on the image, as they have no schedules."""
    if reduction.adaptive:
        raise ArgumentError(
            f"`method` must be one with a fixed number of tokens, got {reduction.name}, whose number depends on the "
            "image. Patch the model with it directly, and time it with compare_latency."
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
        value: See `lightning_prune.schedule.read_schedule`. A number is converted as the method is usually used: the
            tokens are removed at `block`, before block 0, or distributed over many blocks as in ToMe.
        transformer: The Vision Transformer.
        reduction: The method.
        block: The reducing block of methods that reduce once, an index or a fraction of the depth.
        example_inputs: (B, channels, height, width) images whose tokens are counted. Only needed if `value` is a
            number, the token count depends on the image size, and the method reduces in many blocks.

    Returns:
        The schedule, which names its method.

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
    return fitted(found.with_method(spec_of(reduction)), transformer, reduction)


def fitted(
    schedule: Schedule | KeepRates, transformer: VisionTransformer, reduction: Reduction | None = None
) -> Schedule | KeepRates:
    """Keep rates in which that of a method that scales images is exactly that of a grid; others as they are.

    It is the largest grid with at most the share of the patches. Where the grid depends on the images, it is chosen for
    each size of them instead; see `counts_for`.

    Args:
        schedule: The schedule.
        transformer: The Vision Transformer.
        reduction: The method; None for those that the schedule names.
    """
    if not isinstance(schedule, KeepRates) or not _scales_images(schedule, reduction):
        return schedule
    grid = None if transformer.num_tokens is None else transformer.grid()
    if grid is None:
        return schedule
    rows, columns = grid
    removed = schedule.exact(0).removes(rows * columns, 0)
    h, w = largest_grid(rows, columns, rows * columns - removed)
    return KeepRates([h * w / (rows * columns), *schedule.rates[1:]], schedule.method, schedule.made_on)


def counts_for(
    schedule: KeepRates, transformer: VisionTransformer, images: Tensor, tokens: int, reduction: Reduction | None = None
) -> Schedule:
    """The schedule of keep rates for images of one size.

    Args:
        schedule: The keep rates.
        transformer: The Vision Transformer.
        images: (B, channels, height, width).
        tokens: N, the tokens of these images.
        reduction: The method; None for those that the schedule names.
    """
    grid, prefix = transformer.grid(images), transformer.num_prefix_tokens
    if grid is None or not _scales_images(schedule, reduction):
        return schedule.schedule(tokens, prefix)
    patches = tokens - prefix
    h, w = largest_grid(*grid, patches - schedule.exact(0).removes(tokens, prefix))
    later = KeepRates([1.0, *schedule.rates[1:]]).schedule(prefix + h * w, prefix)
    return Schedule([patches - h * w, *later.removed[1:]], schedule.method, schedule.made_on)


def _scales_images(schedule: KeepRates, reduction: Reduction | None) -> bool:
    """Whether the method of block 0 scales the images; not if block 0 does not reduce."""
    if 0 not in schedule.reducing:
        return False
    named = schedule.methods.get(0) if reduction is None else reduction
    return named is not None and resolve(named).scales_images


def check_named_method(schedule: Schedule | KeepRates, reduction: Reduction) -> None:
    """Raises ArgumentError if the schedule names another method than `reduction`, or several."""
    if isinstance(schedule.method, tuple):
        named = ", ".join(sorted({str(spec) for spec in schedule.methods.values()}))
        raise ArgumentError(
            f"`method` must be left out if the schedule has several methods ({named}), got {spec_of(reduction)}."
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
                f"`schedule` must be a Schedule or KeepRates with {reduction.name}, because the token count of this "
                f"model depends on the image size, got {amount}."
            )
        n = transformer.count_tokens(example_inputs)
    share = KeepRates.single(depth, index, amount).schedule(n, prefix).total_removed if amount < 1 and amount else None
    remove = int(amount) if share is None else share
    largest = reduction.max_total_removed(n, prefix, depth, index)
    if remove > largest:
        raise ScheduleError(
            f"`schedule` must remove at most {largest} of the {n} tokens with {reduction.name}, got {remove}."
        )
    counts = allocate_schedule(reduction, remove, n, prefix, depth, index)
    return counts if share is None else KeepRates.of(counts, n, prefix)


def reductions_of(schedule: Schedule | KeepRates) -> Reduction | dict[int, Reduction]:
    """The method of a schedule: one reduction, or one for each reducing block if they differ.

    Raises:
        ArgumentError: If the schedule names no method, or one that does not exist.
    """
    if isinstance(schedule.method, MethodSpec):
        return resolve(schedule.method)
    if schedule.method is None:
        raise ArgumentError(
            f"`method` must be given, because the schedule names none, got {schedule!r}. For example: "
            'lp.patch(model, "tome", schedule).'
        )
    return {block: resolve(spec) for block, spec in schedule.methods.items()}
