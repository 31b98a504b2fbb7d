"""What to call methods that are searched together."""

from collections.abc import Sequence

from lightning_prune.errors import ArgumentError
from lightning_prune.reduction import Reduction


def labels_of(reductions: Sequence[Reduction]) -> dict[Reduction, str]:
    """One label each: the name, and where several have it the settings that they differ in.

    Args:
        reductions: In any order.

    Raises:
        ArgumentError: If two are the same.

    Example:
        >>> from lightning_prune.planning.labels import labels_of
        >>> from lightning_prune.reduction import Random, TopK
        >>> list(labels_of([TopK(), Random(), Random(seed=3)]).values())
        ['topk', 'random (seed=0)', 'random (seed=3)']
    """
    found: dict[Reduction, str] = {}
    for reduction in reductions:
        if reduction in found:
            raise ArgumentError(f"`methods` must differ from one another, got {reduction!r} twice.")
        namesakes = [other.settings() for other in reductions if other.name == reduction.name]
        own = reduction.settings()
        differing = [key for key in own if any(other.get(key) != own[key] for other in namesakes)]
        told = ", ".join(f"{key}={own[key]!r}" for key in differing)
        found[reduction] = f"{reduction.name} ({told})" if told else reduction.name
        taken = sum(label.split(" #")[0] == found[reduction] for label in found.values())
        if taken > 1:  # they differ in what they do not say
            found[reduction] += f" #{taken}"
    return found
