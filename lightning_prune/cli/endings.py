"""How a command ends: exit statuses, signals, errors on one line, and warnings without the place in the code."""

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_prune.comparison.lost_processes import is_lost_process
from lightning_prune.errors import PruneError

BAD_INPUT = 2
"""Exit status after an error in the input or the environment."""
BUDGET_MISSED = 3
"""Exit status if results were written, but nothing meets the budget."""

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_INPUT_ERRORS = (PruneError, argparse.ArgumentError, MisconfigurationException, FileNotFoundError)
_NOISE = (
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    "LightningCLI's args parameter is intended to run from within Python.*",  # see `cli.words.parser_words`
)
_NOISE_CATEGORIES = (PossibleUserWarning, DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def run_to_end(work: Callable[[], int]) -> int:
    """Runs a command and returns its exit status.

    SIGINT and SIGTERM end the work at once. Lightning ends a run after SIGTERM only between two batches, and then with
    status 0; after SIGINT it does so with status 1.

    Args:
        work: The command; returns its exit status.

    Returns:
        What `work` returns; 2 after an error in the input or of the operating system, such as a full disk, or if
        another process is lost, which is printed on one line; 130 after SIGINT and 143 after SIGTERM. What the error
        knows about kept results, in its notes, is printed, too.

    Raises:
        Exception: An unexpected error, as it is.
    """
    with _plain_warnings(), _signals_noted() as received:
        try:
            return work()
        except BaseException as error:
            if received:
                _print_stopped(received[0], error)
                return 128 + received[0]
            is_environment = (isinstance(error, OSError) and error.errno is not None) or is_lost_process(error)
            if not is_environment and not isinstance(error, _INPUT_ERRORS):
                raise
            _print_line(f"error: {_text_of(error)}")
            return BAD_INPUT


def _text_of(error: BaseException) -> str:
    """The message of an error on one line."""
    if is_lost_process(error):
        kept = " ".join(getattr(error, "__notes__", ["Start the same command again."]))
        return f"another process has ended or cannot be reached. {kept} ({' '.join(str(error).split())})"
    if isinstance(error, OSError) and error.errno is not None:
        named = "" if error.filename is None else f"{error.filename}: "
        return f"{named}{error.strerror}."
    return " ".join(str(error).split())


def _print_stopped(number: int, error: BaseException) -> None:
    if getattr(rank_zero_only, "rank", 0) == 0:  # of several processes each gets the signal
        notes = getattr(error, "__notes__", ["Start the same command again."])
        _print_line(f"stopped by {_NAMES[signal.Signals(number)]} before the end. {' '.join(notes)}")


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """A context in which SIGINT and SIGTERM are noted in the yielded list and raise an exception each time.

    A signal that is ignored, as SIGINT is for jobs in the background, stays ignored.
    """
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        before = {number: signal.getsignal(number) for number in _NAMES}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """A context in which warnings are printed without file and line, and those that are not about the run are not."""

    def plain(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None) -> str:
        return f"warning: {' '.join(str(message).split())}\n"

    before = warnings.formatwarning
    with warnings.catch_warnings():
        if not sys.warnoptions:  # else the user has said what to show
            for category in _NOISE_CATEGORIES:
                warnings.filterwarnings("ignore", category=category)
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        warnings.formatwarning = plain
        try:
            yield
        finally:
            warnings.formatwarning = before
