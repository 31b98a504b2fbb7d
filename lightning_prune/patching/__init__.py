"""Where tokens go: opens a model's blocks to a reduction and closes them again, bit-exactly."""

from lightning_prune.patching.families import VisionTransformer, find_vision_transformer
from lightning_prune.patching.patch import PatchHandle, check_schedule, patch, unpatch

__all__ = ["PatchHandle", "VisionTransformer", "check_schedule", "find_vision_transformer", "patch", "unpatch"]
