"""A time limit in seconds, from which several steps take their shares."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class TimeLimit:
    """A time limit in seconds, from now on.

    Args:
        seconds: The limit; None for none.
        clock: Seconds.
    """

    seconds: float | None
    clock: Callable[[], float] = time.perf_counter
    start: float = field(init=False)

    def __post_init__(self) -> None:
        """Starts the clock."""
        self.start = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def left(self) -> float:
        """Seconds that are left."""
        return float("inf") if self.seconds is None else max(self.seconds - self.elapsed, 0.0)

    def share(self, share: float) -> float | None:
        """A share of the seconds that are left, at least a millisecond; None without a limit."""
        return None if self.seconds is None else max(share * self.left(), 1e-3)

    def deadline(self, share: float = 1.0) -> float:
        """The time on the clock when a share of what is left now has passed."""
        return self.clock() + share * self.left()
