"""Where in the model tokens are removed: patches the blocks of a Vision Transformer, and restores them to the bit."""

from lightning_prune.patching.api import patch
from lightning_prune.patching.compatibility import check_schedule, has_exact_tail
from lightning_prune.patching.models import VisionTransformer, find_vision_transformer
from lightning_prune.patching.patch_handle import PatchHandle, unpatch
from lightning_prune.patching.schedule_forms import allocate_schedule, resolve_schedule
from lightning_prune.patching.token_map import TokenTrace, trace_tokens

__all__ = [
    "PatchHandle",
    "TokenTrace",
    "VisionTransformer",
    "allocate_schedule",
    "check_schedule",
    "find_vision_transformer",
    "has_exact_tail",
    "patch",
    "resolve_schedule",
    "trace_tokens",
    "unpatch",
]
