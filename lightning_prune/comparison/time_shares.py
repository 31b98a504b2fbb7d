"""How the time limit of a comparison is divided among what is planned and timed."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune._utils.time_limit import TimeLimit


@dataclass(frozen=True)
class ShareTuning:
    """How the time limit is divided: each task gets its weight over that of all tasks that are still to do.

    Attributes:
        curve: Weight of the latency curve where schedules are planned on it; half of it where none is.
        method: Weight of the first method that is planned in a task; the final run has it, too.
        control: Weight of a method that nobody named.
        further: Weight of each further method or objective of the same task.
        variant: Weight of each variant in the final run.
        front_share: Share of the task of `auto` at target speed-ups in which its methods are measured.
    """

    curve: float = 1.0
    method: float = 1.0
    control: float = 0.5
    further: float = 0.5
    variant: float = 0.25
    front_share: float = 0.6


SHARES = ShareTuning()


class TimeShares:
    """Divides what is left of a time limit among the tasks that are still to do.

    Args:
        limit: The time limit of all tasks.
        weights: Task -> its weight; the last is always done, the others if there is time.
        reserved: Seconds of the last task that no other may take.

    Example:
        >>> from lightning_prune.comparison.time_shares import TimeShares
        >>> from lightning_prune._utils.time_limit import TimeLimit
        >>> shares = TimeShares(TimeLimit(60, clock=lambda: 0.0), {"pomt": 1, "tome": 1, "final": 2}, reserved=4)
        >>> shares.seconds("pomt"), shares.seconds("tome", least=30), shares.seconds("final")
        (14.0, 30, 60.0)
    """

    def __init__(self, limit: TimeLimit, weights: Mapping[str, float], reserved: float) -> None:
        self.limit, self.reserved = limit, reserved
        self._weights, self._last = dict(weights), list(weights)[-1]
        self._is_first = True

    def seconds(self, task: str, least: float = 0.0) -> float | None:
        """The share of a task that begins now; None if there is no time for it, but never for the first one.

        Args:
            task: Its name; each is asked for once.
            least: Seconds that it takes at least.
        """
        share = self._weights[task] / sum(self._weights.values())
        self.skip(task)
        if task == self._last:
            return self.limit.left()
        free = max(self.limit.left() - self.reserved, 0.0)
        is_first, self._is_first = self._is_first, False
        return None if least > free and not is_first else max(share * free, least)

    def skip(self, task: str) -> None:
        """Leaves the share of a task to the others.

        Args:
            task: Its name.
        """
        del self._weights[task]
