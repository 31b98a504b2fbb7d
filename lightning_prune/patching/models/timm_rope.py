"""timm's transformers with rotary embeddings: EVA, EVA-02, Perception Encoder, DINOv3, and NaFlexViT."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.block_split import GAMMA, POST_NORM, PRE_NORM, AttnMlpSplit
from lightning_prune.patching.class_swap import PatchedModule
from lightning_prune.patching.models.base import VisionTransformer
from lightning_prune.patching.models.timm_vit import GridGuard, TimmAdapter
from lightning_prune.patching.position_terms import patch_positions, take_rotation
from lightning_prune.patching.token_state import TokenState


class TimmRope(TimmAdapter):
    """Blocks receive `rope`, sines and cosines side by side, for the patch tokens.

    (N - P, D), or one for each head, or one for each image.
    """

    recipes: ClassVar[dict[str, AttnMlpSplit]] = {
        "timm.models.eva:EvaBlock": GAMMA,
        "timm.models.eva:EvaBlockPostNorm": POST_NORM,
        "timm.models.vision_transformer:Block": PRE_NORM,
        "timm.models.vision_transformer:ResPostBlock": POST_NORM,
    }

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        return replace(super().describe(root, path), has_position_inputs=getattr(root, "rope", None) is not None)

    def adapt_position_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: TokenState, num_prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gathers the rotary embedding to the tokens that are left; a fused token is not rotated."""
        rope = kwargs.get("rope")
        if rope is None:
            return args, kwargs
        return args, {
            **kwargs,
            "rope": arrived.adapt_once(rope, lambda r: _take(r, arrived.positions, num_prefix_tokens)),
        }


class TimmEva(TimmRope):
    """EVA, EVA-02, Perception Encoder, DINOv3, sapiens and others on timm's `Eva`."""

    name: ClassVar[str] = "timm Eva"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.eva:Eva",)


class NaFlexGuard(GridGuard):
    """Refuses batches of images of several sizes: their masks and their pooling are made for all tokens."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own, for images (B, channels, height, width) only."""
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise UnsupportedModelError(
                "A NaFlexVit whose blocks remove tokens takes images (B, C, H, W) only: padded batches of patches are "
                "masked and pooled by where each token stood. Remove the patch to run them."
            )
        return super().forward(x, *args, **kwargs)


class TimmNaFlex(TimmRope):
    """NaFlexVit on batches of images of one size."""

    name: ClassVar[str] = "timm NaFlexVit"
    guard: ClassVar[type[PatchedModule] | None] = NaFlexGuard
    roots: ClassVar[tuple[str, ...]] = ("timm.models.naflexvit:NaFlexVit",)

    def count(self, model: Any) -> int | None:
        """The images decide."""
        return None

    def entry(self, model: Any) -> nn.Module:
        """Patches, positions and prefix tokens are made by one module."""
        embeds: nn.Module = model.embeds
        return embeds

    def has_class_token(self, model: Any) -> bool:
        """Which is also where the CLS token lies."""
        return model.embeds.cls_token is not None


def _take(table: Tensor, positions: Tensor, num_prefix_tokens: int) -> Tensor:
    half = table.shape[-1] // 2
    unrotated = torch.cat((table.new_zeros(half), table.new_ones(half)))
    return take_rotation(table, patch_positions(positions, num_prefix_tokens), unrotated)
