"""Which tokens go: one file per published method, each a pure function on tensors with a thin class around it."""

from difflib import get_close_matches

from lightning_prune.errors import ArgumentError
from lightning_prune.reduction.base import Attention, Reduced, Reduction, Sequence
from lightning_prune.reduction.pomt import POMT, pomt, pomt_scores
from lightning_prune.reduction.random import Random

METHODS: dict[str, type[Reduction]] = {method.name: method for method in (POMT, Random)}

__all__ = [
    "METHODS",
    "POMT",
    "Attention",
    "Random",
    "Reduced",
    "Reduction",
    "Sequence",
    "pomt",
    "pomt_scores",
    "resolve",
]


def resolve(method: str | Reduction) -> Reduction:
    """The reduction that a name stands for, with its default settings; an instance stands for itself.

    Raises:
        ArgumentError: If there is no method of that name; suggests the nearest.
    """
    if isinstance(method, Reduction):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    near = get_close_matches(str(method).lower(), METHODS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = ", ".join(repr(name) for name in METHODS)
    raise ArgumentError(f"`method` must be a Reduction or one of {known}, got {method!r}.{hint}")
