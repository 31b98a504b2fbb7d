"""Which tokens go: one file per published method, each a pure function on tensors with a thin class around it."""

from lightning_prune.reduction.base import Attention, Reduced, Reduction, Sequence
from lightning_prune.reduction.pomt import POMT, pomt, pomt_scores
from lightning_prune.reduction.random import Random
from lightning_prune.reduction.registry import METHODS, names, resolve

__all__ = [
    "METHODS",
    "POMT",
    "Attention",
    "Random",
    "Reduced",
    "Reduction",
    "Sequence",
    "names",
    "pomt",
    "pomt_scores",
    "resolve",
]
