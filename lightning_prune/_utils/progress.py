"""A progress bar over time, on a terminal only."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

OnStep = Callable[[], None]


@contextmanager
def progress_bar(description: str, time_limit: float | None, enabled: bool = True) -> Iterator[OnStep]:
    """Yields a function to call now and then; the bar fills with the time spent and vanishes at the end.

    Written to standard error, and only if that is a terminal: tables and logs stay clean.

    Args:
        description: What is going on.
        time_limit: When the bar is full; None shows a pulse.
        enabled: False shows nothing.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    quiet = not (enabled and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task(description, total=time_limit)
        start = time.perf_counter()
        yield lambda: bar.update(task, completed=time.perf_counter() - start)
