"""What one block leaves for the next, tied to the tokens themselves: whoever has these tokens has what belongs to them.

A model runs in several threads, forward several times before backward, and under gradient checkpointing a block runs a
second time during backward, in another thread, when all others have long run. State of a block or a model would be
that of another pass by then; what is tied to a tensor is not, and is freed with it.
"""

from typing import Any

import torch
from torch import Tensor

_NAME = "_lightning_prune_left"


def leave(tokens: Tensor, left: Any) -> None:
    """Ties `left` to the tokens (B, N, C) that leave a block.

    To the tensor, which `torch.compile` traces, also where each block is compiled by itself; and to its storage, which
    is what reentrant checkpointing keeps: it runs a block again on a detached tensor.
    """
    setattr(tokens, _NAME, left)
    storage = _storage(tokens)
    if storage is not None:
        setattr(storage, _NAME, left)


def found(tokens: Tensor) -> Any:
    """What was left with the tokens that enter a block; None if nothing was."""
    left = getattr(tokens, _NAME, None)
    if left is None:
        left = getattr(_storage(tokens), _NAME, None)
    return left


def _storage(tensor: Tensor) -> Any:
    """None while compiling, which traces no storages, and for tensors without one, as those of `torch.func` are.

    Nothing is hidden by that: the tensor itself carries the same, and a block that finds neither raises.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None
