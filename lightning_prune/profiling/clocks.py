"""What runs are timed by: wall time, or CPU time of the process.

It needs the standard library alone, as `lightning_prune.bundle` copies this file to devices without torch.
"""

import time
from collections.abc import Callable
from typing import cast

from lightning_prune._utils.validation import check, check_choice
from lightning_prune.errors import ArgumentError


class CpuClock:
    """Times runs by the CPU time of this process; time limits stay in wall time, which is what a call returns.

    At one thread, CPU time repeats to about 1% also where other programs share the cores, which spread wall time by
    20%. With several threads it counts all of them, also while they wait for work.

    Example:
        >>> from lightning_prune.profiling.clocks import CpuClock
        >>> CpuClock().of_run() <= CpuClock().of_run()
        True
    """

    def __call__(self) -> float:
        """Seconds of wall time."""
        return time.perf_counter()

    def of_run(self) -> float:
        """Seconds of CPU time of this process."""
        return time.process_time()


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": CpuClock()}
"""Name -> clock."""


def read_clock(clock: object, device_type: str = "cpu") -> Callable[[], float]:
    """The clock of a name; a function is returned as it is.

    Args:
        clock: `"wall"`, `"cpu"`, or a function that returns seconds.
        device_type: Where runs are timed, such as `"cpu"` or `"cuda"`.

    Raises:
        ArgumentError: If it is none of these, or CPU time is asked for on another device, which it does not measure.

    Example:
        >>> from lightning_prune.profiling.clocks import CpuClock, read_clock
        >>> isinstance(read_clock("cpu"), CpuClock)
        True
    """
    if isinstance(clock, str):
        check_choice("clock", clock, list(CLOCKS))
        clock = CLOCKS[clock]
    if isinstance(clock, CpuClock) and device_type != "cpu":
        raise ArgumentError(
            f"`clock` must be 'wall' on a {device_type} device, got 'cpu': CPU time says nothing of what runs there."
        )
    check("clock", clock, "'wall', 'cpu' or a function", callable(clock))
    return cast(Callable[[], float], clock)


def clock_name(clock: Callable[[], float]) -> str:
    """`"cpu"` for CPU time, else `"wall"`."""
    return "cpu" if isinstance(clock, CpuClock) else "wall"
