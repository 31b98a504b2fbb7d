"""What all plots share: a colour and a marker for each method, labels without overlap, a scale of speed-ups, saving."""

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_prune._utils.files import atomic_write, user_path

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
INK = "#222222"
"""Of text, and of the dense model."""
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


class PointLabel(NamedTuple):
    """The label of a point.

    Attributes:
        text: The label.
        x: The point, in data coordinates.
        y: The point, in data coordinates.
        color: Of the text.
    """

    text: str
    x: float
    y: float
    color: str


_SIDES = ((1, 1), (1, -1), (-1, -1), (-1, 1), (0, 1), (0, -1), (1, 0), (-1, 0))  # of the point, best first
_DISTANCES = (8, 16, 26, 38)  # from the point, in typographical points
_ALIGNMENT = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}


def place_labels(axes: Axes, labels: Sequence[PointLabel]) -> list[Annotation]:
    """Writes labels next to their points, inside the axes and without overlap.

    A label covers neither another label nor a point, and crosses a line only if there is no other room. Earlier labels
    take precedence: a label for which there is no room is left out. The limits of the axes must be final.

    Args:
        axes: Where the points are.
        labels: The most important first.

    Returns:
        The labels that are written.
    """
    figure = axes.get_figure(root=True)
    if figure is None:
        return []
    figure.draw_without_rendering()  # computes the layout
    frame = axes.get_window_extent()
    paths = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
    marked = [np.asarray(path.vertices) for line, path in zip(axes.lines, paths, strict=True) if _has_markers(line)]
    points = np.concatenate([*marked, np.empty((0, 2))])
    written: list[Annotation] = []
    for label in labels:
        taken = [other.get_window_extent().padded(2) for other in written]
        places = [
            (crossing, distance, side)
            for distances in (_DISTANCES[:2], _DISTANCES[2:])
            for crossing in (False, True)
            for distance in distances
            for side in _SIDES
        ]
        for crossing, distance, side in places:
            annotation = _annotate(axes, label, distance * side[0], distance * side[1], side)
            box = annotation.get_window_extent().padded(2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            free = not box.count_overlaps(taken) and not box.count_contains(points)
            if inside and free and (crossing or not any(path.intersects_bbox(box, filled=False) for path in paths)):
                written.append(annotation)
                break
            annotation.remove()
    return written


def _annotate(axes: Axes, label: PointLabel, right: float, up: float, side: tuple[int, int]) -> Annotation:
    """Writes a label at a distance from its point, in typographical points."""
    annotation = axes.annotate(
        label.text,
        (label.x, label.y),
        textcoords="offset points",
        xytext=(right, up),
        ha=_ALIGNMENT[side[0]][0],
        va=_ALIGNMENT[side[1]][1],
        fontsize=8,
        color=label.color,
        zorder=6,
    )
    annotation.set_in_layout(False)
    return annotation


def _has_markers(line: Line2D) -> bool:
    return line.get_marker() not in (None, "", " ", "None", "none")


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
    return user_path(path)
