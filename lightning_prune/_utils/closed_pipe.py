"""Prints a result to standard output, whose reader may have ended, as `head` does. It needs nothing but Python."""

import os
import sys


def print_all(text: str) -> None:
    """Prints a text at once. Where the reader of a pipe has ended, the rest is dropped without an error.

    Args:
        text: Without the last line break.

    Example:
        >>> from lightning_prune._utils.closed_pipe import print_all
        >>> print_all("done")
        done
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python writes what is left in the buffer when it ends
        os.close(nowhere)
