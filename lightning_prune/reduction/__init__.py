"""Which tokens are removed: one file per published method, each a pure function on tensors and a thin class."""

from lightning_prune.reduction.base import AttentionInputs, Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.cls_attention import EViT, TopK, evit, topk, topk_scores
from lightning_prune.reduction.diffrate import DiffRateMerge, diffrate_counts
from lightning_prune.reduction.energy_merging import PiToMe, pitome, pitome_energy, pitome_margin
from lightning_prune.reduction.functional import sources_of
from lightning_prune.reduction.merge_schedule import tome_schedule
from lightning_prune.reduction.merging import merge_into_nearest
from lightning_prune.reduction.pixel_variance import VWTIntra, vwt_intra
from lightning_prune.reduction.pomt import POMT, pomt_reduce, pomt_scores
from lightning_prune.reduction.portable import portable_graph
from lightning_prune.reduction.random_drop import RandomDrop
from lightning_prune.reduction.registry import METHODS, names, resolve, spec_of
from lightning_prune.reduction.representation_shift import RepresentationShift, shift, shift_scores
from lightning_prune.reduction.resize import Resize, resampling_matrix, scale_images, smaller_grids
from lightning_prune.reduction.soft_merging import SoftMerge, soft_merge
from lightning_prune.reduction.tome import ToMe, bipartite_matching
from lightning_prune.reduction.visual_words import TokensPerImage, VWTInter, tokens_per_image

__all__ = [
    "METHODS",
    "POMT",
    "AttentionInputs",
    "DiffRateMerge",
    "EViT",
    "PiToMe",
    "RandomDrop",
    "Reduction",
    "ReductionOutput",
    "RepresentationShift",
    "Resize",
    "SoftMerge",
    "ToMe",
    "TokenSequence",
    "TokensPerImage",
    "TopK",
    "VWTInter",
    "VWTIntra",
    "bipartite_matching",
    "diffrate_counts",
    "evit",
    "merge_into_nearest",
    "names",
    "pitome",
    "pitome_energy",
    "pitome_margin",
    "pomt_reduce",
    "pomt_scores",
    "portable_graph",
    "resampling_matrix",
    "resolve",
    "scale_images",
    "shift",
    "shift_scores",
    "smaller_grids",
    "soft_merge",
    "sources_of",
    "spec_of",
    "tokens_per_image",
    "tome_schedule",
    "topk",
    "topk_scores",
    "vwt_intra",
]
