"""Where tokens go: opens a model's blocks to a reduction and closes them again, bit-exactly."""

from lightning_prune.patching.api import PatchHandle, patch, unpatch
from lightning_prune.patching.compatibility import check_schedule
from lightning_prune.patching.models import VisionTransformer, find_vision_transformer
from lightning_prune.patching.token_map import TokenTrace, trace_tokens

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
