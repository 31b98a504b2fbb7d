"""Which tokens go: one file per published method, each a pure function on tensors with a thin class around it."""

from lightning_prune.reduction.base import Attention, Reduced, Reduction, Sequence
from lightning_prune.reduction.evit import EViT, evit
from lightning_prune.reduction.functional import sources_of
from lightning_prune.reduction.nearest import merge_into_nearest
from lightning_prune.reduction.pomt import POMT, pomt, pomt_scores
from lightning_prune.reduction.random import Random
from lightning_prune.reduction.registry import METHODS, names, resolve
from lightning_prune.reduction.shift import Shift, shift, shift_scores
from lightning_prune.reduction.tome import ToMe, bipartite_matching
from lightning_prune.reduction.tome_schedule import tome_schedule
from lightning_prune.reduction.topk import TopK, topk, topk_scores
from lightning_prune.reduction.vwt_inter import VWTInter
from lightning_prune.reduction.vwt_intra import VWTIntra, vwt_intra
from lightning_prune.reduction.word_counts import TokensPerImage, tokens_per_image

__all__ = [
    "METHODS",
    "POMT",
    "Attention",
    "EViT",
    "Random",
    "Reduced",
    "Reduction",
    "Sequence",
    "Shift",
    "ToMe",
    "TokensPerImage",
    "TopK",
    "VWTInter",
    "VWTIntra",
    "bipartite_matching",
    "evit",
    "merge_into_nearest",
    "names",
    "pomt",
    "pomt_scores",
    "resolve",
    "shift",
    "shift_scores",
    "sources_of",
    "tokens_per_image",
    "tome_schedule",
    "topk",
    "topk_scores",
    "vwt_intra",
]
