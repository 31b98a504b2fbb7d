"""The families of Hugging Face: ViT and DeiT, DINOv2, DINOv3, CLIP and SigLIP."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.patching.block_split import DROPOUT, LAYER_SCALE, OUTPUT, TOWER, AttnMlpSplit
from lightning_prune.patching.input_resize import InputResize, ResizedInput, ResizedModule, ScalingSites, image_size_of
from lightning_prune.patching.models.base import SplitCheckInput, VisionTransformer
from lightning_prune.patching.models.huggingface import HuggingFace, core_of
from lightning_prune.patching.position_terms import patch_positions, take_rotation
from lightning_prune.patching.token_state import TokenState


class ResizedRotation(ResizedModule):
    """Mixin for the class of a rotary embedding that reads the size of the images, and nothing else of them."""

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The embedding of images of the scaled size."""
        height, width = self._prune_patch.new_size(image_size_of(images))
        return super().forward(images[..., :height, :width], *args, **kwargs)


class HuggingFaceViT(HuggingFace):
    """ViT and DeiT, with absolute position embeddings."""

    name: ClassVar[str] = "Hugging Face ViT and DeiT"
    roots: ClassVar[tuple[str, ...]] = (
        "ViTModel",
        "ViTForImageClassification",
        "ViTForMaskedImageModeling",
        "DeiTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "DeiTForMaskedImageModeling",
    )
    layers: ClassVar[tuple[str, ...]] = ("ViTLayer", "DeiTLayer")
    classifiers: ClassVar[tuple[str, ...]] = (
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
    )
    towers: ClassVar[tuple[str, ...]] = ("ViTModel", "DeiTModel")
    grids: ClassVar[tuple[str, ...]] = ("ViTForMaskedImageModeling", "DeiTForMaskedImageModeling")
    has_position_inputs = True

    def known_split(self, block: nn.Module) -> AttnMlpSplit:
        """The MLP is one module, or two in early releases of version 5."""
        return OUTPUT if hasattr(block, "intermediate") else DROPOUT


class HuggingFaceDinov2(HuggingFace):
    """DINOv2 with and without registers; position embeddings are interpolated to the image size."""

    name: ClassVar[str] = "Hugging Face DINOv2"
    roots: ClassVar[tuple[str, ...]] = (
        "Dinov2Model",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2Backbone",
        "Dinov2WithRegistersBackbone",
    )
    grids: ClassVar[tuple[str, ...]] = ("Dinov2Backbone", "Dinov2WithRegistersBackbone")
    layers: ClassVar[tuple[str, ...]] = ("Dinov2Layer", "Dinov2WithRegistersLayer")
    towers: ClassVar[tuple[str, ...]] = ("Dinov2Model", "Dinov2WithRegistersModel")
    pooling: ClassVar[tuple[str, ...]] = ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification")
    any_size = True
    has_position_inputs = True

    def known_split(self, block: nn.Module) -> AttnMlpSplit:
        """With layer scale and drop path in both parts."""
        return LAYER_SCALE


class HuggingFaceDinov3(HuggingFaceDinov2):
    """DINOv3; every block receives `position_embeddings`, (cosine, sine) of the patch tokens, (N - P, D) each."""

    name: ClassVar[str] = "Hugging Face DINOv3"
    roots: ClassVar[tuple[str, ...]] = ("DINOv3ViTModel", "DINOv3ViTBackbone")
    towers: ClassVar[tuple[str, ...]] = ("DINOv3ViTModel",)
    grids: ClassVar[tuple[str, ...]] = ("DINOv3ViTBackbone",)
    layers: ClassVar[tuple[str, ...]] = ("DINOv3ViTLayer",)
    interpolates = False

    def scaling_sites(self, transformer: VisionTransformer, resize: InputResize) -> ScalingSites:
        """The rotary embedding reads the size of the images by itself."""
        rope = core_of(transformer.root).rope_embeddings
        return ScalingSites({transformer.patch_embed: ResizedInput, rope: ResizedRotation})

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """With arbitrary angles."""
        tokens = super().split_check_input(transformer).tokens
        config = core_of(transformer.root).config
        angles = torch.linspace(0, 1, config.hidden_size // config.num_attention_heads, device="cpu")
        angles = angles.expand(tokens - transformer.num_prefix_tokens, -1)
        return SplitCheckInput(tokens, {"position_embeddings": (angles.cos(), angles.sin())})

    def adapt_position_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: TokenState, num_prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Selects the rotary embedding of the tokens that are left; a fused token is not rotated."""
        args, kwargs = super().adapt_position_inputs(args, kwargs, arrived, num_prefix_tokens)
        cosine, sine = kwargs["position_embeddings"]

        def gather(table: Tensor, unrotated: float) -> Tensor:
            index = patch_positions(arrived.positions, num_prefix_tokens)
            return take_rotation(table, index, table.new_full(table.shape[-1:], unrotated))

        left = (
            arrived.adapt_once(cosine, lambda table: gather(table, 1.0)),
            arrived.adapt_once(sine, lambda table: gather(table, 0.0)),
        )
        return args, {**kwargs, "position_embeddings": left}


class HuggingFaceCLIP(HuggingFace):
    """CLIP's vision tower; the text tower is never patched."""

    name: ClassVar[str] = "Hugging Face CLIP"
    roots: ClassVar[tuple[str, ...]] = (
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPVisionTransformer",
        "CLIPForImageClassification",
    )
    layers: ClassVar[tuple[str, ...]] = ("CLIPEncoderLayer",)
    towers: ClassVar[tuple[str, ...]] = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPVisionTransformer")
    pooling: ClassVar[tuple[str, ...]] = ("CLIPForImageClassification",)

    def known_split(self, block: nn.Module) -> AttnMlpSplit:
        """Both towers have the same kind of block."""
        return TOWER

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """With `attention_mask`, which has no default."""
        return SplitCheckInput(super().split_check_input(transformer).tokens, {"attention_mask": None})


class HuggingFaceSigLIP(HuggingFaceCLIP):
    """SigLIP's vision tower, without a CLS token and with attention pooling."""

    name: ClassVar[str] = "Hugging Face SigLIP"
    roots: ClassVar[tuple[str, ...]] = ("SiglipVisionModel", "SiglipVisionTransformer", "SiglipForImageClassification")
    layers: ClassVar[tuple[str, ...]] = ("SiglipEncoderLayer",)
    towers: ClassVar[tuple[str, ...]] = ()
    class_token = False
    pooling: ClassVar[tuple[str, ...]] = roots
