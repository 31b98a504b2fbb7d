"""Where tokens go: opens a model's blocks to a reduction and closes them again, bit-exactly."""

from lightning_prune.patching.checks import check_schedule
from lightning_prune.patching.families import VisionTransformer, find_vision_transformer
from lightning_prune.patching.patch import PatchHandle, patch, unpatch
from lightning_prune.patching.trace import TokenTrace, trace_tokens

__all__ = [
    "PatchHandle",
    "TokenTrace",
    "VisionTransformer",
    "check_schedule",
    "find_vision_transformer",
    "patch",
    "trace_tokens",
    "unpatch",
]
