"""The first blocks of a transformer as a transformer of their own."""

import copy

from torch import nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.models.base import VisionTransformer
from lightning_prune.patching.models.registry import describe


def truncated(transformer: VisionTransformer, depth: int) -> VisionTransformer:
    """A copy with the first blocks only, between the same embedding and head; it shares all weights.

    Its outputs mean nothing, but a block costs what it costs in the whole model, and it is exported and compiled in a
    fraction of the time.

    Args:
        transformer: Dense.
        depth: Number of blocks, at least 1 and at most that of the transformer.

    Raises:
        UnsupportedModelError: If the blocks are not in one list of modules.

    Example:
        >>> import timm
        >>> from lightning_prune.patching import find_vision_transformer
        >>> from lightning_prune.patching.truncation import truncated
        >>> whole = find_vision_transformer(timm.create_model("vit_tiny_patch16_224"))
        >>> whole.depth, truncated(whole, 3).depth
        (12, 3)
    """
    shared = {id(tensor): tensor for tensor in (*transformer.root.parameters(), *transformer.root.buffers())}
    root = copy.deepcopy(transformer.root, shared)
    copied = describe(transformer.adapter, root, transformer.path)
    for parent in list(root.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Sequential | nn.ModuleList) and list(child.children()) == list(copied.blocks):
                setattr(parent, name, child[:depth])
                return describe(transformer.adapter, root, transformer.path)
    raise UnsupportedModelError(f"The blocks of {type(root).__name__} are not one list of modules.")
