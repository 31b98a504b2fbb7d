"""One progress of a whole piece of work: a bar on a terminal, elsewhere a line now and then, with the time left."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

OnStep = Callable[[], None]

SECONDS_BETWEEN_LINES = 10.0
SHORTEST_WAIT = 1.0  # seconds, of the thread that writes them


class WorkProgress:
    """What is being done and how far it is, how long the whole has taken, and about how long it will take yet.

    On a terminal it is a bar, which disappears at the end. Elsewhere, as in a log, it is a line every 10 seconds, also
    during a long step. Both go to standard error, so that they do not mix with tables.

    Args:
        whole: Name of the whole work.
        seconds: Seconds that it may take; None where that is not known.
        enabled: Whether to show anything.
    """

    def __init__(self, whole: str, seconds: float | None, enabled: bool = True) -> None:
        self.whole = whole
        self._start = self._last_line = time.perf_counter()
        self._end: float | None = None
        self._doing: list[str] = []  # parts of parts, the innermost last
        self._details: list[str] = []  # of each of them
        description = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # gives way on a narrow terminal
        columns = (
            TextColumn("{task.description}", table_column=description),
            BarColumn(20),
            TextColumn("{task.fields[times]}"),
        )
        on_terminal = enabled and sys.stderr.isatty()
        # What is printed meanwhile appears above the bar; where it goes to a file it stays in the file.
        self._bar = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            disable=not on_terminal,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(whole, total=None, times="")
        self._writes_lines, self._lock = enabled and not on_terminal, threading.Lock()
        self.expect(seconds)

    def expect(self, seconds: float | None) -> None:
        """Says about how long the whole will take from now on.

        Args:
            seconds: None where that is not known.
        """
        self._end = None if seconds is None or seconds == float("inf") else time.perf_counter() + seconds
        self.step()

    def step(self) -> None:
        """Shows how far the work is; called after each part of it."""
        now = time.perf_counter()
        if self._writes_lines:
            self._write_line(now)
        total = None if self._end is None else max(self._end, now) - self._start
        self._bar.update(
            self._task, description=self._text(), completed=now - self._start, total=total, times=self._times(now)
        )

    @contextmanager
    def doing(self, part: str) -> Iterator[None]:
        """A context in which a part of the work is done.

        Args:
            part: Its name.
        """
        self._doing.append(part)
        self._details.append("")
        self.step()
        try:
            yield
        finally:
            self._doing.pop()
            self._details.pop()
            self.step()

    def note(self, detail: str) -> None:
        """Says how far the innermost part of the work is; shown with the next step.

        Args:
            detail: Such as `3 of 12 blocks`.
        """
        if self._details:
            self._details[-1] = detail

    @contextmanager
    def shown(self) -> Iterator[None]:
        """A context in which the bar is visible, or lines are written."""
        ended = threading.Event()

        def write_lines() -> None:
            while not ended.wait(max(SECONDS_BETWEEN_LINES, SHORTEST_WAIT)):
                self._write_line(time.perf_counter())

        writer = threading.Thread(target=write_lines, daemon=True)
        with self._bar:
            if self._writes_lines:
                writer.start()
            try:
                yield
            finally:
                ended.set()
                if self._writes_lines:
                    writer.join()

    def _write_line(self, now: float) -> None:
        """Writes a line, unless one was written in the last 10 seconds."""
        with self._lock:  # a step may be at the same time
            if now - self._last_line < SECONDS_BETWEEN_LINES:
                return
            self._last_line = now
            print(f"{self._text()}: {self._times(now)}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        """The whole and its parts down to the innermost; one that only repeats what it is part of is left out."""
        named = [self.whole]
        for part in self._doing:
            if not named[-1].lower().startswith(part.lower()):
                named.append(part)
        detail = self._details[-1] if self._details else ""
        return ": ".join(named) + (f", {detail}" if detail else "")

    def _times(self, now: float) -> str:
        taken = _duration(now - self._start)
        if self._end is None:
            return f"{taken} taken"
        left = _duration(max(self._end - now, 0.0))
        return f"{taken} of {_duration(self._end - self._start)} taken, about {left} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


_current: ContextVar[WorkProgress | None] = ContextVar("progress of the whole work", default=None)


@contextmanager
def progress_bar(description: str, time_limit: float | None = None, enabled: bool = True) -> Iterator[OnStep]:
    """Shows the progress of some work, and yields a function to call after each step.

    Inside the context of another one, this work is a part of that: it has no bar of its own, but is named in the other
    one, whose time limit is that of the whole. `note_progress` says how far it is.

    Args:
        description: The work.
        time_limit: Seconds that it may take; None where that is not known.
        enabled: Whether to show anything.
    """
    outer = _current.get()
    if outer is not None:
        with outer.doing(description[:1].lower() + description[1:]):
            yield outer.step
        return
    whole = WorkProgress(description, time_limit, enabled)
    token = _current.set(whole)
    try:
        with whole.shown():
            yield whole.step
    finally:
        _current.reset(token)


def expect_seconds(seconds: float | None) -> None:
    """Says about how long the whole work will take from now on, where its progress is shown.

    Args:
        seconds: None where that is not known.
    """
    whole = _current.get()
    if whole is not None:
        whole.expect(seconds)


def note_progress(detail: str) -> None:
    """Says how far the innermost part of the work is, where its progress is shown.

    Args:
        detail: Such as `3 of 12 blocks`.
    """
    whole = _current.get()
    if whole is not None:
        whole.note(detail)
