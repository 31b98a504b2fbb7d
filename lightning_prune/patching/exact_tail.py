"""The exact tail: patch tokens that no head reads leave the last block before its MLP.

A head that reads prefix tokens only reads nothing of what the MLP of the last block, and the norm after it, compute for
patch tokens: 5% of the operations of DeiT-S. They still are keys and values of the last attention. The outputs are
those of the dense model up to rounding, so this is no method.

It is in force only while the `forward` of the transformer itself runs, which reads those tokens and returns no others.
Whoever calls `forward_features`, `forward_intermediates` or the block gets all tokens, and so do hooks that see them.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_prune.patching.token_hooks import any_reads_tokens
from lightning_prune.patching.token_state import attach_state, get_state

EXACT = "exact"
"""What `lightning_prune.patch` calls the exact tail without a method."""
_MARK = "_lightning_prune_tail"

_numbers = itertools.count(1)
_running: ContextVar[str] = ContextVar("running_exact_tail", default="")


class Head(Protocol):
    """What a tail asks of the adapter of a model family at each call."""

    def reads_patches(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call of `root.forward` reads or returns patch tokens that leave the last block."""
        ...


@dataclass(eq=False)
class ExactTail:
    """The exact tail of one patched model; its root and its last block share it.

    Attributes:
        head: The adapter of the model.
        watched: The modules that see all tokens otherwise: the last block with its parts, what contains it, and the
            norm after it. With a hook on one of them the model runs as if there were no tail.
        ran: Whether the last block ran with the tail when it ran last; None if it never did, or in compiled code only.
    """

    head: Head
    watched: tuple[nn.Module, ...]
    ran: bool | None = None
    _key: str = field(default_factory=lambda: f"tail {next(_numbers)}")
    _traced: bool = False  # in place of `_running`, which compiled code cannot set

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_key": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _key=f"tail {next(_numbers)}")

    def call(self, root: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls `forward`, that of the root, with the tail in force where nothing reads patch tokens.

        Args:
            root: The transformer.
            forward: Its own forward.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        if self.head.reads_patches(root, args, kwargs) or any_reads_tokens(self.watched):
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            self._traced = True
            try:
                return forward(*args, **kwargs)
            finally:
                self._traced = False
        token = _running.set(self._key)
        try:
            return forward(*args, **kwargs)
        finally:
            _running.reset(token)

    def runs(self, tokens: Tensor) -> bool:
        """Whether the tail is in force in the last block, which these tokens (B, N, C) enter."""
        if torch.compiler.is_compiling():
            return self._traced or _running.get() == self._key
        if _running.get() == self._key:
            attach_state(tokens, self._key, _MARK)  # for a checkpointed block, which runs again in backward
            self.ran = True
        else:
            is_backward = torch._C._current_graph_task_id() != -1
            self.ran = is_backward and get_state(tokens, _MARK) == self._key
        return self.ran


def watched_modules(root: nn.Module, block: nn.Module, norms: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """The modules that see patch tokens after the last attention: see `ExactTail.watched`.

    Args:
        root: The transformer; what it returns itself does not count.
        block: Its last block.
        norms: The norms after it that run on all tokens.
    """
    path = next(path for path, module in root.named_modules() if module is block)
    parts = path.split(".")
    outer = [root.get_submodule(".".join(parts[:count])) for count in range(1, len(parts))]
    return (*outer, *block.modules(), *(part for norm in norms for part in norm.modules()))
