"""The picture of a comparison: what each method keeps of the accuracy at which measured latency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_prune.report.plots import save_figure
from lightning_prune.report.rows import Row, Score, dense_of, front_of, placed, rows_of, score_of, series

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
_BARS = {
    "top1": "bars: half the distance between the quartiles of the latency; 95% interval of the change against dense",
    "agreement": "bars: half the distance between the quartiles of the latency",
}
_GREY, _FLOOR, _INK = "#7f8c8d", ("#6b7280", "."), "#222222"
_SPEEDUPS = (0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0)
_WIDE = 6.0  # points below dense from which on a second panel shows what is near dense, which the first presses flat


def plot_pareto(document: Mapping[str, Any]) -> Figure:
    """Top-1 against measured latency: every method a line, dense and int8 points, what was measured with its spread.

    Bars: horizontally half the distance between the quartiles of the latency, vertically the 95% interval of the
    paired difference to dense. A broad grey line joins the rows that no other row beats in both. Where the module logs
    no accuracy the agreement with dense takes its place, and where that is not known either the plot says so.

    Args:
        document: What `compare` writes as `results.json`.

    Raises:
        DataError: If the document has no rows.

    Example:
        >>> dense = {"variant": "dense", "method": "", "latency_ms": 20.0, "top1": 0.90}
        >>> pruned = {"variant": "pomt 1.5x", "method": "pomt", "latency_ms": 13.3, "top1": 0.89}
        >>> [axes.get_ylabel() for axes in plot_pareto({"rows": [dense, pruned]}).axes]
        ['top-1 [%]']
    """
    rows = rows_of(document)
    score = score_of(rows)
    dense = dense_of(rows)
    zoom = _zoom(rows, dense, score)
    figure = Figure(figsize=(8.4, 5.2 if zoom is None else 8.6), layout="constrained")
    panels = [figure.subplots()] if zoom is None else list(figure.subplots(2, 1, sharex=True))
    for axes in panels:
        _draw(axes, rows, dense, score)
    if zoom is not None:
        panels[1].set_ylim(zoom)
        panels[1].set_title("the same, near dense", fontsize=9, loc="left")
    panels[-1].set_xlabel("latency of a batch [ms], faster to the left")
    if score is not None:
        figure.supxlabel(_BARS[score.key], fontsize=7, color=_INK)
    if dense is not None and dense.get("latency_ms"):
        _add_speedups(panels[0], float(dense["latency_ms"]))
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        plain = [handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle in handles]
        figure.legend(plain, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(_title(document, rows), fontsize=10)
    return figure


def save_pareto(document: Mapping[str, Any], path: str | Path) -> Path:
    """Writes `plot_pareto` in the format of the suffix; the file appears whole or not at all.

    Args:
        document: What `compare` writes as `results.json`.
        path: Where, such as `pareto.png`.

    Returns:
        The path.

    Raises:
        DataError: If the document has no rows.
    """
    return save_figure(plot_pareto(document), path)


def _draw(axes: Axes, rows: Sequence[Row], dense: Row | None, score: Score | None) -> None:
    if dense is not None and dense.get("latency_ms") is not None:
        _mark_dense(axes, dense, score)
    if score is None:
        _say_what_is_missing(axes)
    else:
        _draw_front(axes, rows, score)
        _draw_lines(axes, series(rows), score)
        axes.set_ylabel(f"{score.label} [%]")
    axes.margins(0.06)
    axes.grid(alpha=0.25)


def _zoom(rows: Sequence[Row], dense: Row | None, score: Score | None) -> tuple[float, float] | None:
    """The heights that a second panel shows: the best quarter of a wide range, or None where the range is not wide."""
    best = None if dense is None else _share(dense, score)
    if best is None or score is None:
        return None
    heights = [100 * row[score.key] for row in rows if placed(row, score) and row is not dense]
    if len(heights) < 4 or best - min(heights) < _WIDE:
        return None
    top = max(*heights, best)
    reach = (top - min(heights)) / 4
    return top - reach, top + 0.2 * reach


def _mark_dense(axes: Axes, dense: Row, score: Score | None) -> None:
    latency = float(dense["latency_ms"])
    axes.axvline(latency, color=_GREY, linewidth=0.8, linestyle=":")
    height = _share(dense, score)
    if height is None:
        return
    axes.axhline(height, color=_GREY, linewidth=0.8, linestyle=":")
    spread = dense.get("latency_spread") or 0.0
    axes.errorbar(latency, height, xerr=spread, color=_INK, fmt="*", markersize=13, label="dense", zorder=5)


def _draw_lines(axes: Axes, lines: Mapping[str, Sequence[Row]], score: Score) -> None:
    styles = _styles(list(lines))
    for name, all_rows in lines.items():
        rows = sorted((row for row in all_rows if placed(row, score)), key=lambda row: -row["latency_ms"])
        if not rows:
            continue
        color, marker, eight_bit = styles[name]
        latencies = [row["latency_ms"] for row in rows]
        heights = [100 * row[score.key] for row in rows]
        spreads = [row.get("latency_spread") or 0.0 for row in rows]
        axes.errorbar(
            latencies,
            heights,
            xerr=spreads,
            yerr=_intervals(rows, score),
            color=color,
            marker=marker,
            markersize=6,
            markerfacecolor="white" if eight_bit else color,
            linestyle="--" if eight_bit else "-",
            linewidth=1.3,
            elinewidth=0.8,
            capsize=2,
            alpha=0.95,
            label=name,
            zorder=4,
        )


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """Line -> colour, marker, whether it is drawn hollow; a method's int8 variant looks like the method, hollow."""
    bases = list(dict.fromkeys(name.removesuffix("+int8") for name in names))
    others = [base for base in bases if base != "random"]
    chosen = {base: _STYLES[number % len(_STYLES)] for number, base in enumerate(others)} | {"random": _FLOOR}
    return {name: (*chosen[name.removesuffix("+int8")], name.endswith("int8")) for name in names}


def _intervals(rows: Sequence[Row], score: Score) -> np.ndarray | None:
    """Distances (2, rows) from the heights down and up to the ends of the interval, in points; None: not known."""
    if score.key != "top1" or all(row.get("top1_low") is None or row.get("top1_high") is None for row in rows):
        return None
    ends = []
    for row in rows:
        low, change, high = row.get("top1_low"), row.get("top1_change"), row.get("top1_high")
        known = low is not None and change is not None and high is not None
        ends.append((100 * max(change - low, 0.0), 100 * max(high - change, 0.0)) if known else (0.0, 0.0))
    return np.array(ends).T


def _draw_front(axes: Axes, rows: Sequence[Row], score: Score) -> None:
    front = front_of(rows, score)
    if len(front) > 1:
        latencies = [row["latency_ms"] for row in front]
        heights = [100 * row[score.key] for row in front]
        axes.plot(
            latencies,
            heights,
            color="#d5d8dc",
            linewidth=6,
            solid_capstyle="round",
            zorder=1,
            label="beaten by no other",
        )


def _add_speedups(axes: Axes, dense_ms: float) -> None:
    """A second scale above; latency is linear below, so the speed-ups stand at uneven distances."""
    low, high = sorted(axes.get_xlim())
    ticks = [ratio for ratio in _SPEEDUPS if low <= dense_ms / ratio <= high]
    above = axes.secondary_xaxis("top")  # in milliseconds too: a reciprocal scale breaks where it passes zero
    kept: list[float] = []
    for ratio in ticks:  # no two labels closer than their width
        if not kept or abs(dense_ms / kept[-1] - dense_ms / ratio) > 0.05 * (high - low):
            kept.append(ratio)
    above.xaxis.set_major_locator(FixedLocator([dense_ms / ratio for ratio in kept]))
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{dense_ms / place:.3g}x"))
    above.set_xlabel("speed-up over dense")
    axes.set_xlim(low, high)


def _say_what_is_missing(axes: Axes) -> None:
    message = "No accuracy to show: the module logs no val/top1,\nand no agreement with dense was measured."
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", color=_INK)
    axes.set_yticks([])


def _share(row: Row, score: Score | None) -> float | None:
    if score is None:
        return None
    value = 1.0 if score.key == "agreement" else row.get(score.key)  # dense agrees with itself
    return None if value is None else 100 * float(value)


def _title(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    context = document.get("context") or {}
    facts = {**rows[0], **{name: value for name, value in context.items() if value is not None}}
    where = f"{facts.get('device', '?')}, batch {facts.get('batch_size', '?')}, {facts.get('precision', '?')}"
    images = f", {rows[0]['images']} images" if rows[0].get("images") else ""
    return f"{facts.get('model', 'model')}\n{where}{images}"
