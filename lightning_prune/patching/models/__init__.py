"""Adapters for the Vision Transformers of timm, torchvision and Hugging Face."""

from lightning_prune.patching.models.base import ModelAdapter, VisionTransformer
from lightning_prune.patching.models.registry import MODEL_ADAPTERS, describe, find_vision_transformer, restoring
from lightning_prune.patching.models.unsupported import unsupported_reason

__all__ = [
    "MODEL_ADAPTERS",
    "ModelAdapter",
    "VisionTransformer",
    "describe",
    "find_vision_transformer",
    "restoring",
    "unsupported_reason",
]
