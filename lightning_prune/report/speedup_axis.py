"""A scale of speed-ups above a plot over latency."""

from math import log

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

_SPEEDUPS = (0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0)


def add_speedups(axes: Axes, dense_ms: float) -> None:
    """Adds the scale; latency is linear below, so the speed-ups stand at uneven distances.

    Args:
        axes: Latency in milliseconds, its limits settled.
        dense_ms: The latency that speed-ups are relative to.
    """
    low, high = sorted(axes.get_xlim())
    ticks = [ratio for ratio in _SPEEDUPS if low <= dense_ms / ratio <= high]
    apart = 0.05 * (high - low)
    above = axes.secondary_xaxis("top")  # in milliseconds too: a reciprocal scale breaks where it passes zero
    kept: list[float] = []
    for ratio in sorted(ticks, key=lambda ratio: abs(log(ratio))):  # 1x first: no two labels closer than their width
        if all(abs(dense_ms / other - dense_ms / ratio) > apart for other in kept):
            kept.append(ratio)
    above.xaxis.set_major_locator(FixedLocator([dense_ms / ratio for ratio in kept]))
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{dense_ms / place:.3g}x"))
    above.set_xlabel("speed-up over dense")
    axes.set_xlim(low, high)
