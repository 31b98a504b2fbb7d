"""Known transformers that cannot be pruned, and the reasons."""

from torch import nn

GRID_AFTER = "it reshapes its tokens to their grid after the blocks"
"""Why models run only if removed tokens are given back."""
_GRID_INSIDE = "its blocks operate on the grid of tokens (convolutions or windows)"
_STAGES = "it is hierarchical: its stages pool or merge the grid of tokens"
_TWO_KINDS = "its blocks have more than one sequence of tokens"

_TIMM: dict[str, str] = {  # module of timm.models -> reason
    "vision_transformer_sam": _GRID_INSIDE,
    "volo": _GRID_INSIDE,
    "xcit": _GRID_INSIDE,
    "tnt": _TWO_KINDS,
    "crossvit": _TWO_KINDS,
    **dict.fromkeys(
        (
            "coat",
            "davit",
            "efficientformer",
            "efficientformer_v2",
            "efficientvit_mit",
            "efficientvit_msra",
            "gcvit",
            "hiera",
            "levit",
            "maxxvit",
            "mvitv2",
            "nest",
            "nextvit",
            "pit",
            "pvt_v2",
            "swin_transformer",
            "swin_transformer_v2",
            "swin_transformer_v2_cr",
            "tiny_vit",
            "twins",
            "visformer",
        ),
        _STAGES,
    ),
}
TIMM_MODULES = frozenset(_TIMM)
"""Modules of timm.models whose transformers cannot be pruned."""
_TORCHVISION: dict[str, str] = {"swin_transformer": _STAGES, "maxvit": _STAGES}
_HUGGING_FACE: dict[str, str] = {"swin": _STAGES, "swinv2": _STAGES, "sam": _GRID_INSIDE, "pvt": _STAGES}


def unsupported_reason(kind: type[nn.Module]) -> str | None:
    """Why models of this class cannot be pruned; None if no reason is known."""
    for each in kind.__mro__:
        parts = each.__module__.split(".")
        if parts[:2] == ["timm", "models"] and len(parts) > 2:
            reason = _TIMM.get(parts[2])
        elif parts[:2] == ["torchvision", "models"] and len(parts) > 2:
            reason = _TORCHVISION.get(parts[2])
        elif parts[:2] == ["transformers", "models"] and len(parts) > 2:
            reason = _HUGGING_FACE.get(parts[2])
        else:
            reason = None
        if reason is not None:
            return reason
    return None
