"""A progress bar that shows elapsed time, on terminals only."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

OnStep = Callable[[], None]


@contextmanager
def progress_bar(description: str, time_limit: float | None, enabled: bool = True) -> Iterator[OnStep]:
    """Yields a function to call after each step. The bar shows the elapsed time and disappears at the end.

    It is written to standard error if that is a terminal, so it does not mix with tables and logs.

    Args:
        description: Text to the left of the bar.
        time_limit: Seconds at which the bar is full; None for a bar without an end.
        enabled: Whether to show the bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    quiet = not (enabled and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task(description, total=time_limit)
        start = time.perf_counter()
        yield lambda: bar.update(task, completed=time.perf_counter() - start)
