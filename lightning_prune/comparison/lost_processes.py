"""A comparison of several processes, of which one ends in the middle: what is said, and what is kept."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch.distributed import DistError

_SECONDS = 0.5  # between two looks; Lightning looks every 5 seconds


@contextmanager
def watching_processes(trainer: L.Trainer, kept: Callable[[], str]) -> Iterator[None]:
    """A context in which one line says that a process has ended with an error, and what is kept.

    This is about processes that Lightning has started. When one of them is lost, it kills all others within seconds, so
    that this process has no time to say anything later. With another launcher, such as torchrun, nothing is watched.

    Args:
        trainer: Of this rank, whose launcher has started the processes.
        kept: Returns what is kept of the comparison; empty if nothing is.
    """
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(trainer, kept, ended), daemon=True, name="lost-processes")
    if trainer.world_size > 1:
        watch.start()
    try:
        yield
    finally:
        ended.set()


def _watch(trainer: L.Trainer, kept: Callable[[], str], ended: threading.Event) -> None:
    while not ended.wait(_SECONDS):
        started: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
        for number, process in enumerate(started, 1):
            status = process.poll()
            if status and not ended.is_set():
                text = f"error: rank {trainer.global_rank + number} of {trainer.world_size} processes {_how(status)}."
                print(f"{text} {kept()}".strip(), file=sys.stderr, flush=True)
                return


def _how(status: int) -> str:
    """How a process ended, by its exit status or the negative number of a signal."""
    if status > 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached: it has ended, or the time limit of its group has.

    Args:
        error: Of gloo, which raises plain errors that name a file of it, or of NCCL or a store.

    Example:
        >>> from lightning_prune.comparison.lost_processes import is_lost_process
        >>> is_lost_process(RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:7602"))
        True
    """
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
