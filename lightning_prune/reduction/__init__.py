"""Which tokens go: one file per published method, each a pure function on tensors with a thin class around it."""

from lightning_prune.reduction.base import Attention, Reduced, Reduction, Sequence
from lightning_prune.reduction.pomt import POMT, pomt, pomt_scores
from lightning_prune.reduction.random import Random
from lightning_prune.reduction.registry import METHODS, names, resolve
from lightning_prune.reduction.vwt_intra import VWTIntra, patch_variances, vwt_intra

__all__ = [
    "METHODS",
    "POMT",
    "Attention",
    "Random",
    "Reduced",
    "Reduction",
    "Sequence",
    "VWTIntra",
    "names",
    "patch_variances",
    "pomt",
    "pomt_scores",
    "resolve",
    "vwt_intra",
]
