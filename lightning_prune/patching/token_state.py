"""Token state that travels from block to block: sizes, positions and sources of the tokens."""

import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_prune.patching.restored_tokens import Cut, with_cut
from lightning_prune.reduction.base import ReductionOutput
from lightning_prune.reduction.functional import take_values

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value for each thread, None if it was not set. It is not copied or pickled.

    `torch.compile` cannot trace `threading.local`. In a compiled graph all threads share one value, because the graph
    only reads what it has set itself.
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def get(self) -> T | None:
        """This thread's value."""
        return self._values.get(_thread())

    def set(self, value: T | None) -> None:
        """Sets this thread's value. None deletes it, so that nothing is kept for threads that have ended."""
        if value is None:
            self._values.pop(_thread(), None)
        else:
            self._values[_thread()] = value

    def __getstate__(self) -> dict[str, Any]:
        return {"_values": {}}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


_NAME = "_lightning_prune_state"


def attach_state(tokens: Tensor, state: Any, name: str = _NAME) -> None:
    """Attaches `state` to the tokens (B, N, C) that leave a block.

    It is attached to the tensor, which `torch.compile` traces even if each block is compiled separately, and to the
    storage of the tensor, because reentrant checkpointing runs a block again on a detached tensor with that storage.

    Args:
        tokens: The tokens.
        state: What is attached.
        name: Of the attribute; states of different names do not replace each other.
    """
    setattr(tokens, name, state)
    storage = _storage(tokens)
    if storage is not None:
        setattr(storage, name, state)


def get_state(tokens: Tensor, name: str = _NAME) -> Any:
    """The state attached to the tokens that enter a block; None if there is none."""
    state = getattr(tokens, name, None)
    if state is None:
        state = getattr(_storage(tokens), name, None)
    return state


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own that can be compared: not in a graph, nor inside `torch.func`."""
    return _storage(tensor) is not None


def _storage(tensor: Tensor) -> Any:
    """The storage of a tensor; None during compilation, and for tensors without one, such as those of `torch.func`.

    The tensor itself has the same state, and a block that finds none raises an error.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


class TokenState(NamedTuple):
    """State of the tokens that are left, relative to the tokens of block 0.

    Only what later blocks use is computed, because at batch size 1 even a few operations take noticeable time.

    Attributes:
        num_tokens: K, the number of tokens.
        adapted: Pairs of a position input and its selection for these tokens.
        original_positions: (B, K) index of each token in block 0, -1 for fused tokens; None if blocks receive no
            position inputs (`VisionTransformer.has_position_inputs`).
        sizes: (B, K) number of patches in each token, if the method tracks sizes.
        log_sizes: (B, 1, 1, K) their logarithms, if they are added to the attention logits of later blocks.
        cuts: What gives the removed tokens back, if somebody reads all of them.
    """

    num_tokens: int
    adapted: list[tuple[Tensor, Tensor]]
    original_positions: Tensor | None = None
    sizes: Tensor | None = None
    log_sizes: Tensor | None = None
    cuts: tuple[Cut, ...] = ()

    @property
    def positions(self) -> Tensor:
        """`original_positions` of a model with `has_position_inputs`."""
        assert self.original_positions is not None
        return self.original_positions

    def adapt_once(self, source: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """`gather(source)`, computed once for all blocks that receive the same tensor, as in most models."""
        for known, gathered in self.adapted:
            if known is source:
                return gathered
        gathered = gather(source)
        del self.adapted[:-1]  # keeps two, for sines and cosines; a bias of a single block is not needed again
        self.adapted.append((source, gathered))
        return gathered


def next_token_state(
    arrived: TokenState | None,
    reduced: ReductionOutput,
    positions_needed: bool,
    weighs_keys: bool,
    cut: Cut | None = None,
) -> TokenState:
    """The state of the tokens after a reduction.

    Args:
        arrived: The state before it; None for all tokens of block 0.
        reduced: The output of the reduction.
        positions_needed: Whether later blocks receive position inputs.
        weighs_keys: Whether sizes weight the attention of later blocks.
        cut: What undoes the reduction, if somebody reads all tokens.
    """
    positions, sizes, cuts = reduced.positions, reduced.sizes, () if arrived is None else arrived.cuts
    if arrived is not None:
        if sizes is None and arrived.sizes is not None:  # of an earlier block, whose method keeps them
            sizes = torch.where(positions < 0, 1, take_values(arrived.sizes, positions.clamp(min=0)))
        if positions_needed:
            original = take_values(arrived.positions, positions.clamp(min=0))
            positions = torch.where(positions < 0, -1, original)
    log_sizes = sizes.log()[:, None, None].to(reduced.tokens.dtype) if weighs_keys and sizes is not None else None
    cuts = cuts if cut is None else with_cut(cuts, cut)
    return TokenState(positions.shape[1], [], positions if positions_needed else None, sizes, log_sizes, cuts)
