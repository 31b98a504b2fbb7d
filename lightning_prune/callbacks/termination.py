"""SIGTERM while something is planned or measured, which takes minutes between two batches."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A context in which SIGTERM ends the work at once: Lightning notes it, and looks for it between batches only.

    The handler of before is called first: Lightning's notes the signal, that of the command ends the work itself. A
    signal that is ignored stays ignored. Nothing changes in threads other than the main one, which cannot set handlers.

    Raises:
        SIGTERMException: In the context, when the signal comes.
    """
    before = signal.getsignal(signal.SIGTERM)
    below = getattr(before, "signal_handlers", (before,))  # what Lightning has put its own handler on top of
    if threading.current_thread() is not threading.main_thread() or signal.SIG_IGN in below:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if callable(before):
            before(number, frame)
        raise SIGTERMException(128 + number)  # a status that says so, where nothing catches it

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: set outside of Python
