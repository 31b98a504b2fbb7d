"""Hugging Face's ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP, one family for each way to treat their blocks."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.patching.blocks import DROPOUT, LAYER_SCALE, OUTPUT, TOWER, Halves
from lightning_prune.patching.families.base import Trial, VisionTransformer
from lightning_prune.patching.families.huggingface import HuggingFace, core_of
from lightning_prune.patching.positions import patch_positions, take_rotation
from lightning_prune.patching.survivors import Survivors


class HuggingFaceViT(HuggingFace):
    """ViT and DeiT: absolute positions, added once."""

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
    carries = True

    def recipe(self, block: nn.Module) -> Halves:
        """The MLP is one module, or two in the first versions 5."""
        return OUTPUT if hasattr(block, "intermediate") else DROPOUT


class HuggingFaceDinov2(HuggingFace):
    """DINOv2 with and without registers: positions are fitted to the size of the images."""

    name: ClassVar[str] = "Hugging Face DINOv2"
    roots: ClassVar[tuple[str, ...]] = (
        "Dinov2Model",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    )
    layers: ClassVar[tuple[str, ...]] = ("Dinov2Layer", "Dinov2WithRegistersLayer")
    pooling: ClassVar[tuple[str, ...]] = ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification")
    any_size = True
    carries = True

    def recipe(self, block: nn.Module) -> Halves:
        """Layer scale and drop path in both."""
        return LAYER_SCALE


class HuggingFaceDinov3(HuggingFaceDinov2):
    """DINOv3: every block receives `position_embeddings`, (cosine, sine), (N - P, D) each, of the patch tokens."""

    name: ClassVar[str] = "Hugging Face DINOv3"
    roots: ClassVar[tuple[str, ...]] = ("DINOv3ViTModel",)
    layers: ClassVar[tuple[str, ...]] = ("DINOv3ViTLayer",)

    def trial(self, transformer: VisionTransformer) -> Trial:
        """Any angles will do."""
        tokens = super().trial(transformer).tokens
        config = core_of(transformer.root).config
        angles = torch.linspace(0, 1, config.hidden_size // config.num_attention_heads, device="cpu")
        angles = angles.expand(tokens - transformer.prefix_tokens, -1)
        return Trial(tokens, {"position_embeddings": (angles.cos(), angles.sin())})

    def carry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: Survivors, prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gathers the rotary embedding to the tokens that are left; a fused token is not rotated."""
        args, kwargs = super().carry(args, kwargs, arrived, prefix_tokens)
        cosine, sine = kwargs["position_embeddings"]

        def gather(table: Tensor, unrotated: float) -> Tensor:
            index = patch_positions(arrived.positions, prefix_tokens)
            return take_rotation(table, index, table.new_full(table.shape[-1:], unrotated))

        left = (
            arrived.carry(cosine, lambda table: gather(table, 1.0)),
            arrived.carry(sine, lambda table: gather(table, 0.0)),
        )
        return args, {**kwargs, "position_embeddings": left}


class HuggingFaceCLIP(HuggingFace):
    """CLIP's vision tower; the text tower is never touched."""

    name: ClassVar[str] = "Hugging Face CLIP"
    roots: ClassVar[tuple[str, ...]] = (
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPVisionTransformer",
        "CLIPForImageClassification",
    )
    layers: ClassVar[tuple[str, ...]] = ("CLIPEncoderLayer",)
    pooling: ClassVar[tuple[str, ...]] = ("CLIPForImageClassification",)

    def recipe(self, block: nn.Module) -> Halves:
        """The same block in both towers."""
        return TOWER

    def trial(self, transformer: VisionTransformer) -> Trial:
        """The mask has no default."""
        return Trial(super().trial(transformer).tokens, {"attention_mask": None})


class HuggingFaceSigLIP(HuggingFaceCLIP):
    """SigLIP's vision tower: no CLS token, pooled by attention."""

    name: ClassVar[str] = "Hugging Face SigLIP"
    roots: ClassVar[tuple[str, ...]] = ("SiglipVisionModel", "SiglipVisionTransformer", "SiglipForImageClassification")
    layers: ClassVar[tuple[str, ...]] = ("SiglipEncoderLayer",)
    class_token = False
    pooling: ClassVar[tuple[str, ...]] = roots
