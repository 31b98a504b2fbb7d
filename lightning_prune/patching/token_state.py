"""Token state that travels from block to block: sizes, positions and sources of the tokens."""

import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_prune.reduction.base import ReductionOutput

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value that each thread sets and gets for itself; None where it has set none. Left out of copies and pickles.

    `threading.local` would do, but `torch.compile` does not trace it. A compiled graph needs no
    distinction of threads: it reads what it has set.
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def get(self) -> T | None:
        """This thread's value."""
        return self._values.get(_thread())

    def set(self, value: T | None) -> None:
        """Sets this thread's value; None forgets it, so that threads that have ended leave nothing behind."""
        if value is None:
            self._values.pop(_thread(), None)
        else:
            self._values[_thread()] = value

    def __getstate__(self) -> dict[str, Any]:
        return {"_values": {}}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


_NAME = "_lightning_prune_left"


def attach_state(tokens: Tensor, left: Any) -> None:
    """Ties `left` to the tokens (B, N, C) that leave a block.

    To the tensor, which `torch.compile` traces, also where each block is compiled by itself; and to its storage, which
    is what reentrant checkpointing keeps: it runs a block again on a detached tensor.
    """
    setattr(tokens, _NAME, left)
    storage = _storage(tokens)
    if storage is not None:
        setattr(storage, _NAME, left)


def get_state(tokens: Tensor) -> Any:
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


class TokenState(NamedTuple):
    """The tokens that are left, seen from block 0.

    What no block can ask for is not kept: at batch 1 the few operations that it takes are felt.

    Attributes:
        num_tokens: K, how many are left.
        adapted: What was gathered for these tokens before, with what it was gathered from.
        original_positions: (B, K) index of each token in block 0, -1 for a fused token; None where blocks receive no
            position inputs (`VisionTransformer.has_position_inputs`).
        sizes: (B, K) patches that each stands for, where the method keeps account of it.
        log_sizes: (B, 1, 1, K) their logarithms, where they weigh the attention of later blocks: added to its logits.
        sources: (B, N) which of the K each token of block 0 went into, where the model's pooling must know.
    """

    num_tokens: int
    adapted: list[tuple[Tensor, Tensor]]
    original_positions: Tensor | None = None
    sizes: Tensor | None = None
    log_sizes: Tensor | None = None
    sources: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """`original_positions` of a model with `has_position_inputs`."""
        assert self.original_positions is not None
        return self.original_positions

    def adapt_once(self, source: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """`gather(source)`, once for all blocks that receive the same tensor: most models share one among them."""
        for known, gathered in self.adapted:
            if known is source:
                return gathered
        gathered = gather(source)
        del self.adapted[:-1]  # sines and cosines may come as two; a bias of each block's own is not asked for again
        self.adapted.append((source, gathered))
        return gathered


def next_token_state(
    arrived: TokenState | None, reduced: ReductionOutput, positions_needed: bool, weighs_keys: bool
) -> TokenState:
    """Who is left once a reduction has worked on those that `arrived`.

    Args:
        arrived: Who was left before; None for all tokens of block 0.
        reduced: What the reduction made of them.
        positions_needed: Whether later blocks receive position inputs.
        weighs_keys: Whether their sizes weigh the attention of later blocks.
    """
    positions, sources, sizes = reduced.positions, reduced.sources, reduced.sizes
    if arrived is not None:
        if sizes is None and arrived.sizes is not None:  # of an earlier block, whose method keeps them
            sizes = torch.where(positions < 0, 1, arrived.sizes.gather(1, positions.clamp(min=0)))
        if positions_needed:
            original = arrived.positions.gather(1, positions.clamp(min=0))
            positions = torch.where(positions < 0, -1, original)
        if sources is not None and arrived.sources is not None:
            sources = sources.gather(1, arrived.sources)
    log_sizes = sizes.log()[:, None, None].to(reduced.tokens.dtype) if weighs_keys and sizes is not None else None
    return TokenState(positions.shape[1], [], positions if positions_needed else None, sizes, log_sizes, sources)
