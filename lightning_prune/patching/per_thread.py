"""A value for each thread: a server may run one model in several."""

import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value that each thread sets and gets for itself; None where it has set none. Left out of copies and pickles.

    `threading.local` would do, but `torch.compile` does not trace it. Within a compiled graph threads need not be told
    apart: what is read there was set there.
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
