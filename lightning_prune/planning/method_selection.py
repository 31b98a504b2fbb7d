"""Which methods can plan for a model, in which blocks, and by which label."""

from collections.abc import Sequence
from typing import Any

from lightning_prune._utils.validation import check
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.compatibility import check_reduction
from lightning_prune.patching.schedule_forms import refuse_adaptive
from lightning_prune.profiling import resolve_block
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import MethodSpec

AUTO_METHODS = ("tome", "pomt-nearest", "topk", "resize")
"""What `methods="auto"` searches: two that merge, which lose the least accuracy, one that costs little latency, and one
that makes the images smaller, which costs none and after which the others can go on."""

Methods = str | Reduction | Sequence[str | Reduction]
Blocks = str | int | float | Sequence[int | float]


def usable_methods(
    methods: Methods, blocks: Blocks, transformer: VisionTransformer
) -> dict[str, tuple[Reduction, tuple[int, ...]]]:
    """The methods that can be used with this model, by label, and the blocks in which each may reduce; at least one.

    Args:
        methods: As `plan` takes them.
        blocks: As `plan` takes them.
        transformer: The Vision Transformer.

    Raises:
        ArgumentError: If the images decide how many tokens a method removes, two are the same, or `blocks` is unusable.
        UnsupportedModelError: If none can be used.
    """
    wanted = AUTO_METHODS if isinstance(methods, str) and methods == "auto" else methods
    listed: list[Any] = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    if not listed:
        raise ArgumentError('`methods` must be "auto", a method, or a list of at least one, got an empty list.')
    allowed = allowed_blocks(blocks, transformer)
    found: dict[Reduction, tuple[int, ...]] = {}
    reasons: list[str] = []
    for method in listed:
        is_method = isinstance(method, str | MethodSpec | Reduction)
        check("methods", method, '"auto", a name or a Reduction, or a list of these', is_method)
        reduction = resolve(method)
        refuse_adaptive(reduction)
        try:
            is_known = reduction in found
        except TypeError as error:
            raise ArgumentError(f"`methods` must be hashable, got {reduction!r}: {error}.") from error
        if is_known:
            raise ArgumentError(f"`methods` must differ from one another, got {reduction!r} twice.")
        own = (0,) if reduction.site == "input" else allowed
        try:
            check_reduction(transformer, reduction, block=None if reduction.site == "input" else own[0])
            found[reduction] = own
        except UnsupportedModelError as error:
            reasons.append(f"{reduction.name}: {error}")
    if not found:
        raise UnsupportedModelError(f"None of the methods can be used with this model. {' '.join(reasons)}")
    return {label: (reduction, found[reduction]) for reduction, label in method_labels(list(found)).items()}


def allowed_blocks(blocks: Blocks, transformer: VisionTransformer) -> tuple[int, ...]:
    """The indices of the blocks that may reduce, ascending.

    Args:
        blocks: As `plan` takes them.
        transformer: The Vision Transformer.

    Raises:
        ArgumentError: If it is neither `"all"`, a block, nor a list of blocks.
    """
    depth, first = transformer.depth, transformer.first_prunable_block
    if isinstance(blocks, str) and blocks == "all":
        return tuple(range(first, depth))
    listed: Sequence[Any] = blocks if isinstance(blocks, list | tuple | range) else [blocks]
    if not listed or any(isinstance(block, bool) or not isinstance(block, int | float) for block in listed):
        raise ArgumentError(f'`blocks` must be "all", a block, or a list of at least one, got {blocks!r}.')
    return tuple(sorted({resolve_block(block, depth, first) for block in listed}))


def method_labels(reductions: Sequence[Reduction]) -> dict[Reduction, str]:
    """A label for each method: its name, and if several have it the settings in which they differ.

    Args:
        reductions: Different ones.

    Example:
        >>> from lightning_prune.planning.method_selection import method_labels
        >>> from lightning_prune.reduction import RandomDrop, TopK
        >>> list(method_labels([TopK(), RandomDrop(), RandomDrop(seed=3)]).values())
        ['topk', 'random (seed=0)', 'random (seed=3)']
    """
    labels: dict[Reduction, str] = {}
    for reduction in reductions:
        others = [other.settings() for other in reductions if other.name == reduction.name]
        settings = reduction.settings()
        differing = [key for key in settings if any(other.get(key) != settings[key] for other in others)]
        text = ", ".join(f"{key}={settings[key]!r}" for key in differing)
        label = f"{reduction.name} ({text})" if text else reduction.name
        same = sum(other.split(" #")[0] == label for other in labels.values())
        labels[reduction] = f"{label} #{same + 1}" if same else label  # what differs is not among the settings
    return labels
