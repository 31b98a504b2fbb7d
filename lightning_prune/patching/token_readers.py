"""Which blocks' outputs are read with all tokens while a patched model runs, so that removed tokens are given back.

Between two outputs that are read, the sequence stays short. What is read is decided by the call: a head that reads
prefix tokens reads none, `forward_features` and models that return tokens read that of the last block,
`forward_intermediates` and `output_hidden_states` those that they name, and a hook the one that it is on. Whoever calls
the blocks in another way is not known to leave any out, and gets all of them.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_prune._utils.validation import check_choice
from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.restored_tokens import Cut, RestoreRule
from lightning_prune.patching.token_hooks import any_reads_tokens, reads_tokens
from lightning_prune.patching.token_state import TokenState, attach_state, get_state
from lightning_prune.reduction.base import Reduction

RestoreMode = Literal["auto", "copy", "delta"]

RESTORE_MODES: tuple[RestoreMode, ...] = ("auto", "copy", "delta")
_MARK = "_lightning_prune_read"

_numbers = itertools.count(1)


class _Call(NamedTuple):
    """A call of a patched model that runs: the key of its readers, and the blocks whose outputs are read."""

    key: str
    read: frozenset[int] | None


_running: ContextVar[_Call | None] = ContextVar("running_token_readers", default=None)


class ScaledInput(Protocol):
    """What scales the images of a model."""

    def cut(self, device: torch.device) -> Cut:
        """What undoes the scaling of the images that run."""
        ...


class Reader(Protocol):
    """What is asked of the adapter of a model family at each call."""

    def read_blocks(
        self, root: nn.Module, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> frozenset[int] | None:
        """The blocks whose outputs a call of `root.forward` reads; None if any may be read."""
        ...


def rule_for(mode: RestoreMode, reduction: Reduction) -> RestoreRule:
    """How the tokens that a method removes are restored: by default copied if it merges them, else by their changes."""
    if mode != "auto":
        return mode
    return "copy" if reduction.is_lossless else "delta"


def check_restore(restore: Any) -> None:
    """Raises ArgumentError if `restore` is not one of the modes, or None."""
    if restore is not None:
        check_choice("restore", restore, RESTORE_MODES)


@dataclass(eq=False)
class TokenReaders:
    """What is read of one patched model; its root and its blocks share it.

    Attributes:
        mode: How removed tokens are given back.
        reader: The adapter of the model.
        blocks: The blocks, in order.
        after: The modules that see the output of the last block: the norm after it, and what contains the blocks.
        first: The first block that removes tokens.
        always: Blocks whose outputs are read by every call, which then decides nothing; None where each call does.
        scaled: What scales the images, if they are, and if the grid of all patches is given back.
    """

    mode: RestoreMode
    reader: Reader
    blocks: tuple[nn.Module, ...] = field(repr=False)
    after: tuple[nn.Module, ...] = field(repr=False)
    first: int
    always: frozenset[int] | None = None
    scaled: ScaledInput | None = None
    _key: str = field(default_factory=lambda: f"readers {next(_numbers)}")
    _traced: _Call | None = None  # in place of `_running`, which compiled code cannot set

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "_parts"}
        return {**kept, "_key": None, "_traced": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _key=f"readers {next(_numbers)}")

    @property
    def last(self) -> int:
        """Index of the last block."""
        return len(self.blocks) - 1

    def cuts(self, state: TokenState | None, device: torch.device) -> tuple[Cut, ...]:
        """What gives all tokens back.

        Args:
            state: Of the tokens that are left; None if no block has removed any.
            device: Where they are.
        """
        cuts = () if state is None else state.cuts
        return cuts if self.scaled is None else (self.scaled.cut(device), *cuts)

    def call_forward(self, root: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls `forward`, that of the root, with what it reads by itself."""
        return self.call(self.reader.read_blocks(root, len(self.blocks), args, kwargs), forward, args, kwargs)

    def call(self, read: Iterable[int] | None, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls a function of the root that reads the outputs of certain blocks.

        A call within another one that was made in this way reads what that one reads.

        Args:
            read: Indices of the blocks; None if any may be read.
            function: A method of the root.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Raises:
            UnsupportedModelError: If a hook would see the short sequence inside a block.
        """
        if self._current() is not None:
            return function(*args, **kwargs)
        hooked = self._hooked()
        if self.scaled is not None and read is not None and -1 in {*read, *(hooked or ())}:
            raise UnsupportedModelError(
                "What enters block 0 of a model whose images are scaled down is the smaller grid, and it is read, as "
                "`hidden_states[0]`, a `stem` or by a hook: ask for later blocks, or use another method than resize."
            )
        made = _Call(self._key, None if read is None or hooked is None else frozenset(read) | hooked)
        if torch.compiler.is_compiling():
            self._traced = made
            try:
                return function(*args, **kwargs)
            finally:
                self._traced = None
        token = _running.set(made)
        try:
            return function(*args, **kwargs)
        finally:
            _running.reset(token)

    def read_of(self, tokens: Tensor) -> frozenset[int] | None:
        """The blocks whose outputs are read in the run in which these tokens (B, N, C) enter a block; None for all."""
        if self.always is not None:
            return self.always
        current = self._current()
        if torch.compiler.is_compiling():
            return None if current is None else current.read
        if current is None and torch._C._current_graph_task_id() != -1:
            current = get_state(tokens, _MARK)  # a checkpointed block that runs again in backward
        else:
            attach_state(tokens, current, _MARK)
        return None if current is None else current.read

    def mark(self, tokens: Tensor, read: frozenset[int] | None) -> None:
        """Marks the output of a block for the next one, which may run again in backward with it.

        Args:
            tokens: (B, N, C).
            read: The result of `read_of` for the block.
        """
        if self.always is None and read is not None and not torch.compiler.is_compiling():
            attach_state(tokens, _Call(self._key, read), _MARK)

    def _current(self) -> _Call | None:
        if torch.compiler.is_compiling():
            return self._traced
        current = _running.get()
        return current if current is not None and current.key == self._key else None

    def _hooked(self) -> frozenset[int] | None:
        """The blocks whose output a hook sees; None if a hook for all modules sees that of all."""
        if any_reads_tokens(()):
            return None
        found = {self.last} if any(reads_tokens(each) for each in self.after) else set()
        for index in range(self.first, len(self.blocks)):
            if reads_tokens(self.blocks[index]):
                found |= {index, index - 1}  # a hook also sees what enters
        if not torch.compiler.is_compiling():
            for index, name, part in self._parts:
                if reads_tokens(part):
                    raise UnsupportedModelError(
                        f"A hook must be on block {index} itself, whose output has all tokens, got one on its part "
                        f"{name!r} ({original_class(part).__name__}), where the tokens that were removed are missing. "
                        "Remove the hook, or patch without `restore`."
                    )
        return frozenset(found)

    @cached_property
    def _parts(self) -> list[tuple[int, str, nn.Module]]:
        """The modules inside the blocks that see the short sequence: index of the block, name, module."""
        numbered = enumerate(self.blocks[self.first :], self.first)
        return [(index, name, each) for index, block in numbered for name, each in block.named_modules() if name]
