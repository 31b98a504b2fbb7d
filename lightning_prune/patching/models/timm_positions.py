"""timm's transformers with positional terms inside their blocks: rotary embeddings and relative-position biases."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.attention_capture import Bias, CaptureSlot, SDPARecorder
from lightning_prune.patching.block_split import GAMMA, POST_NORM, PRE_NORM, AttnMlpSplit
from lightning_prune.patching.input_resize import InputResize, ResizedInput, ScalingSites, active_resize
from lightning_prune.patching.models.base import SplitCheckInput, VisionTransformer
from lightning_prune.patching.models.class_lookup import loaded_class
from lightning_prune.patching.models.timm_vit import GridGuard, ResizedPatchEmbed, TimmAdapter
from lightning_prune.patching.patch_division import PatchDivision
from lightning_prune.patching.patched_root import PatchedRoot
from lightning_prune.patching.position_terms import patch_positions, take_rotation
from lightning_prune.patching.resized_positions import (
    ResizedBeitAttention,
    ResizedBeitBias,
    ResizedBias,
    ResizedRelPosBias,
    ResizedRelPosMlp,
    ResizedRope,
)
from lightning_prune.patching.token_state import TokenState
from lightning_prune.reduction.base import AttentionInputs

_RESIZED_BIASES: dict[str, type[ResizedBias]] = {  # class -> mixin that gives its biases for a smaller grid
    "timm.models.beit:Attention": ResizedBeitAttention,
    "timm.models.beit:RelativePositionBias": ResizedBeitBias,
    "timm.layers.pos_embed_rel:RelPosBias": ResizedRelPosBias,
    "timm.layers.pos_embed_rel:RelPosMlp": ResizedRelPosMlp,
}


class TimmRope(TimmAdapter):
    """Blocks receive `rope`, the concatenated sines and cosines of the patch tokens.

    Its shape is (N - P, D), with leading dimensions if it differs between heads or images.
    """

    splits: ClassVar[dict[str, AttnMlpSplit]] = {
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
        """Selects the rotary embedding of the tokens that are left; a fused token is not rotated."""
        rope = kwargs.get("rope")
        if rope is None:
            return args, kwargs
        return args, {
            **kwargs,
            "rope": arrived.adapt_once(rope, lambda r: _take(r, arrived.positions, num_prefix_tokens)),
        }

    def scaling_sites(self, transformer: VisionTransformer, resize: InputResize) -> ScalingSites:
        """Also has the rotary embedding computed for the grid, and not taken from a cache of all patches."""
        rope = getattr(transformer.root, "rope", None)
        if resize.division.image_size is None or not isinstance(rope, nn.Module):
            return super().scaling_sites(transformer, resize)
        sites = super().scaling_sites(transformer, resize)
        cached = ((rope, "_use_cached_embed", False),) if hasattr(rope, "_use_cached_embed") else ()
        mixins = {rope: ResizedRope} if not list(rope.parameters()) else {}
        return ScalingSites({**sites.mixins, **mixins}, (*sites.settings, *cached))


class TimmEva(TimmRope):
    """EVA, EVA-02, Perception Encoder, DINOv3, sapiens and others that use timm's `Eva`."""

    name: ClassVar[str] = "timm Eva"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.eva:Eva",)
    heads: ClassVar[tuple[str, ...]] = roots


class NaFlexGuard(GridGuard):
    """Rejects batches with images of different sizes, whose masks and pooling are for all tokens."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on images (B, channels, height, width); rejects other inputs."""
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise UnsupportedModelError(
                "The input of a NaFlexVit whose blocks remove tokens must be images (B, channels, height, width), got "
                "patches. Remove the patch to run it on them."
            )
        return super().forward(x, *args, **kwargs)


class TimmNaFlex(TimmRope):
    """NaFlexVit on batches of images of one size."""

    name: ClassVar[str] = "timm NaFlexVit"
    guard: ClassVar[type[PatchedRoot]] = NaFlexGuard
    roots: ClassVar[tuple[str, ...]] = ("timm.models.naflexvit:NaFlexVit",)
    heads: ClassVar[tuple[str, ...]] = roots

    def count(self, model: Any) -> int | None:
        """None, because it depends on the image size."""
        return None

    def entry(self, model: Any) -> nn.Module:
        """The module that creates patches, positions and prefix tokens."""
        embeds: nn.Module = model.embeds
        return embeds

    def patch_division(self, root: nn.Module) -> PatchDivision:
        """See `ModelAdapter.patch_division`; the model resamples its positions for every size."""
        embeds: Any = self.entry(root)
        return PatchDivision(tuple(embeds.patch_size), None, bool(embeds.dynamic_img_pad))

    def scaling_sites(self, transformer: VisionTransformer, resize: InputResize) -> ScalingSites:
        """Scales the images only."""
        return ScalingSites({transformer.patch_embed: ResizedInput})

    def has_class_token(self, model: Any) -> bool:
        """Whether `embeds` has a CLS token."""
        return model.embeds.cls_token is not None


def _take(table: Tensor, positions: Tensor, num_prefix_tokens: int) -> Tensor:
    half = table.shape[-1] // 2
    unrotated = torch.cat((table.new_zeros(half), table.new_full((half,), 1.0)))
    return take_rotation(table, patch_positions(positions, num_prefix_tokens), unrotated)


class TimmRelPos(TimmAdapter):
    """A bias for each pair of tokens, of the block or shared by all blocks, is passed to fused attention as its mask.

    The rows and columns of the remaining tokens are selected in that call, where both kinds of bias are summed.
    """

    name: ClassVar[str] = "timm Beit and VisionTransformerRelPos"
    roots: ClassVar[tuple[str, ...]] = (
        "timm.models.beit:Beit",
        "timm.models.vision_transformer_relpos:VisionTransformerRelPos",
    )
    heads: ClassVar[tuple[str, ...]] = roots
    splits: ClassVar[dict[str, AttnMlpSplit]] = {
        "timm.models.beit:Block": GAMMA,
        "timm.models.vision_transformer_relpos:RelPosBlock": PRE_NORM,
        "timm.models.vision_transformer_relpos:ResPostRelPosBlock": POST_NORM,
    }

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        return replace(super().describe(root, path), has_position_inputs=True)

    def unscalable_reason(self, model: Any) -> str | None:
        """Biases are resampled as `set_input_size` of timm does."""
        if getattr(model, "pos_embed", None) is not None:
            return "it adds position embeddings to its relative biases, and timm resamples those for new weights only"
        kinds = {loaded_class(name) for name in _RESIZED_BIASES}
        others = [
            module for module in self._biased(model) if type(module) not in kinds and active_resize(module) is None
        ]
        return f"how its {type(others[0]).__name__} is resampled is not known" if others else None

    def scaling_sites(self, transformer: VisionTransformer, resize: InputResize) -> ScalingSites:
        """The biases of the smaller grid; the image size is not checked against that of the model."""
        model: Any = transformer.root
        kinds = {loaded_class(name): mixin for name, mixin in _RESIZED_BIASES.items()}
        biases = {module: kinds[type(module)] for module in self._biased(model)}
        return ScalingSites(
            {model.patch_embed: ResizedPatchEmbed, **biases}, ((model.patch_embed, "strict_img_size", False),)
        )

    def _biased(self, model: Any) -> list[nn.Module]:
        """The modules with biases, of the model and of its blocks."""
        shared = [getattr(model, "rel_pos_bias", None), getattr(model, "shared_rel_pos", None)]
        own = [getattr(block.attn, "rel_pos", None) for block in model.blocks]
        tables = [
            block.attn
            for block in model.blocks
            if getattr(block.attn, "relative_position_bias_table", None) is not None
        ]
        return [module for module in (*shared, *own, *tables) if module is not None]

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """All tokens, because the bias of a block has their number."""
        assert transformer.num_tokens is not None
        return SplitCheckInput(transformer.num_tokens, {})

    @property
    def requires_recorder(self) -> bool:
        """True, because every block has a bias."""
        return True

    def recorder(
        self,
        calls: list[AttentionInputs],
        log_sizes: Tensor | None,
        arrived: TokenState | None,
        num_prefix_tokens: int,
        capture_slot: CaptureSlot | None,
    ) -> AbstractContextManager[Any]:
        """Selects the bias of the tokens that are left."""
        return SDPARecorder(calls, log_sizes, Bias(arrived, num_prefix_tokens) if arrived is not None else None)
