"""What all plots share: a colour and a marker for each method, a scale of speed-ups, and saving."""

from collections.abc import Sequence
from math import log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_prune._utils.files import atomic_write

# Okabe and Ito's colours, which colour-blind readers tell apart, and markers for those who print in grey.
_STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#6c3483", "X"),
    ("#8a7500", "<"),
    ("#7b3f00", ">"),
    ("#00798c", "h"),
)
_FLOOR = ("#6b7280", ".")  # of `random`, the floor that every method must beat
_SPEEDUPS = (0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0)


def line_styles(names: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """Line -> colour, marker, whether it is drawn hollow; a method's int8 variant looks like the method, hollow.

    Args:
        names: The lines as `series_name` names them, in the order of the legend.

    Example:
        >>> line_styles(["pomt", "random", "pomt+int8"])["pomt+int8"]
        ('#0072b2', 'o', True)
    """
    bases = list(dict.fromkeys(name.removesuffix("+int8") for name in names))
    others = [base for base in bases if base != "random"]
    chosen = {base: _style(number) for number, base in enumerate(others)} | {"random": _FLOOR}
    return {name: (*chosen[name.removesuffix("+int8")], name.endswith("int8")) for name in names}


def _style(number: int) -> tuple[str, str]:
    """Past the tenth the colours return with other markers."""
    around, place = divmod(number, len(_STYLES))
    return _STYLES[place][0], _STYLES[(place + around) % len(_STYLES)][1]


def add_speedups(axes: Axes, dense_ms: float) -> None:
    """Adds a second x-axis with speed-ups; the axis of latencies is linear, so the speed-ups are unevenly spaced.

    Args:
        axes: Latency in milliseconds; its limits are final.
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


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the figure in the format of the suffix; the file appears whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return Path(path)
