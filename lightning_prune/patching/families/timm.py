"""timm's VisionTransformer and VisionTransformerDistilled: DeiT, ViT, DINOv2, CLIP and SigLIP towers and their kin."""

from typing import Any, ClassVar

from timm.layers.attention import Attention
from timm.layers.diff_attention import DiffAttention
from timm.models import vision_transformer as vit
from torch import nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.blocks import PARALLEL, POST_NORM, PRE_NORM, Halves
from lightning_prune.patching.families.base import Family, VisionTransformer
from lightning_prune.patching.overlay import Overlay

_HALVES: dict[type, Halves] = {
    vit.Block: PRE_NORM,
    vit.ResPostBlock: POST_NORM,
    vit.ParallelThingsBlock: PARALLEL,
}


class GridGuard(Overlay):
    """Refuses to fold the tokens that are left into the grid of all tokens, which can fit by accident, and silently."""

    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own, for tokens in a row only."""
        layout = kwargs.get("output_fmt", args[4] if len(args) > 4 else "NCHW")
        if layout == "NCHW":
            raise UnsupportedModelError(
                "forward_intermediates(output_fmt='NCHW') folds tokens into a grid, but this model removes tokens; "
                "use output_fmt='NLC', or remove the patch."
            )
        own: Any = super()  # the class that this one is laid over, which a type checker cannot know
        return own.forward_intermediates(x, *args, **kwargs)


class TimmVisionTransformer(Family):
    """Models whose tokens stay (B, N, C) in `blocks` and whose head reads the prefix tokens or pools the rest.

    Tested with timm 1.0.31. Prefix tokens are counted by the model itself (`num_prefix_tokens`: 0, 1, 2, 5, ...), and
    a CLS token is asked for by name: 24 of timm's names have prefix tokens but no CLS.
    """

    name: ClassVar[str] = "timm VisionTransformer"
    guard: ClassVar[type[Overlay] | None] = GridGuard

    def matches(self, module: nn.Module) -> bool:
        """Subclasses count: VisionTransformerDistilled is one, and users write their own."""
        return isinstance(module, vit.VisionTransformer)

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `Family.describe`."""
        assert isinstance(root, vit.VisionTransformer)
        if isinstance(root.patch_drop, nn.Module) and not isinstance(root.patch_drop, nn.Identity) and root.training:
            raise UnsupportedModelError(
                "The model drops patches while training (patch_drop_rate); call `.eval()` first."
            )
        tokens = None if root.dynamic_img_size else root.patch_embed.num_patches + root.num_prefix_tokens
        return VisionTransformer(
            root=root,
            path=path,
            family=self,
            blocks=tuple(root.blocks),
            prefix_tokens=root.num_prefix_tokens,
            has_class_token=root.cls_token is not None,
            tokens=tokens,
            channels=root.embed_dim,
            entry=root.patch_embed,
            classes=0 if isinstance(root.head, nn.Identity) else root.num_classes,
        )

    def halves(self, block: nn.Module) -> Halves | None:
        """By the nearest known class; a subclass that does otherwise fails the bit-equality check and is cut after."""
        return next((_HALVES[kind] for kind in type(block).__mro__ if kind in _HALVES), None)

    def force_fused(self, block: nn.Module) -> list[nn.Module]:
        """`fused_attn` is an attribute of each attention module, set when the model was built."""
        kinds = (Attention, DiffAttention, vit.ParallelScalingBlock, vit.DiffParallelScalingBlock)
        changed: list[nn.Module] = [m for m in block.modules() if isinstance(m, kinds) and not m.fused_attn]
        for module in changed:
            vars(module)["fused_attn"] = True
        return changed

    def undo_fused(self, changed: list[nn.Module]) -> None:
        """See `Family.undo_fused`."""
        for module in changed:
            vars(module)["fused_attn"] = False
