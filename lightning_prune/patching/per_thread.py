"""State of the forward pass that is under way, apart for each thread: a server may run one model in several."""

import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value that each thread sets and gets for itself; None where it has set none. Left out of copies and pickles.

    `threading.local` would do, but `torch.compile` does not trace it. A compiled graph needs no threads told apart:
    what it reads it wrote itself, and the value never leaves the graph.
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


class KeptForBackward(PerThread[T]):
    """The same, and gradient checkpointing finds it again when it runs a block a second time during backward.

    That happens after the forward pass has cleaned up, and on a GPU in another thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: T | None = None

    def get(self) -> T | None:
        """This thread's value; during backward that of the forward pass before."""
        return self._kept if _in_backward() else super().get()

    def set(self, value: T | None, keep: bool = False) -> None:
        """Sets this thread's value.

        Args:
            value: None forgets it, but for what is kept for backward.
            keep: Whether backward may ask for it. A block that backward runs again leaves what it left before.
        """
        if _in_backward():
            return
        super().set(value)
        if keep:
            self._kept = value

    def __getstate__(self) -> dict[str, Any]:
        return {"_values": {}, "_kept": None}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
