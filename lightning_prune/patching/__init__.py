"""Where tokens go: opens a model's blocks to a reduction and closes them again, bit-exactly."""

from lightning_prune.patching.api import PatchHandle, patch, unpatch
from lightning_prune.patching.compatibility import check_schedule
from lightning_prune.patching.models import VisionTransformer, find_vision_transformer
from lightning_prune.patching.schedule_forms import allocate_schedule, resolve_schedule
from lightning_prune.patching.token_map import TokenTrace, trace_tokens

__all__ = [
    "PatchHandle",
    "TokenTrace",
    "VisionTransformer",
    "allocate_schedule",
    "check_schedule",
    "find_vision_transformer",
    "patch",
    "resolve_schedule",
    "trace_tokens",
    "unpatch",
]
