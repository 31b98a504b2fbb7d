"""The plot of a comparison: accuracy of each method against measured latency."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from lightning_prune._utils.formatting import context_line, milliseconds, model_title, timed_quantity
from lightning_prune.report.rows import (
    Row,
    Score,
    dense_of,
    front_of,
    interval_of,
    placed,
    rows_of,
    score_of,
    series,
)
from lightning_prune.report.styles import INK, add_speedups, line_styles

_BARS = "bars: quartiles of the latency"
_INTERVALS = "95% interval of the change against dense"
_GREY = "#7f8c8d"
_Styles = Mapping[str, tuple[str, str, bool]]
_WIDE = 6.0  # points below dense beyond which a second panel shows the rows near dense, too close in the first
_SLOW = 1.25  # times the latency of dense: slower rows would compress the others into a corner
_LEGEND_LETTERS, _HANDLE_LETTERS = 130, 9  # letters in a row of the legend, and those that a line and a gap take


def plot_pareto(document: Mapping[str, Any]) -> Figure:
    """Draws top-1 against measured latency: a line for each method, points for dense and int8.

    Horizontal bars reach from the lower to the upper quartile of the latency, vertical bars are the 95% interval of the
    paired difference to dense. A broad grey line is the Pareto front. If the module logs no top-1, its own metric is
    drawn instead, else the agreement with dense; if that is unknown too, the plot says so. Rows that take more than
    1.25 times as long as dense are not drawn but named below.

    Args:
        document: What `compare` writes as `results.json`.

    Raises:
        DataError: If the document has no rows.

    Example:
        >>> dense = {"variant": "dense", "latency_ms": 20.0, "top1": 0.90}
        >>> pruned = {"variant": "pomt 1.5x", "method": "pomt", "latency_ms": 13.3, "top1": 0.89}
        >>> [axes.get_ylabel() for axes in plot_pareto({"rows": [dense, pruned]}).axes]
        ['top-1 [%]']
    """
    all_rows = rows_of(document)
    score = score_of(all_rows)
    dense = dense_of(all_rows)
    slow = _slow(all_rows, dense)
    rows = [row for row in all_rows if row not in slow]
    zoom = _zoom(rows, dense, score)
    figure = Figure(figsize=(8.4, 5.2 if zoom is None else 8.6), layout="constrained")
    panels = [figure.subplots()] if zoom is None else list(figure.subplots(2, 1, sharex=True))
    styles = line_styles(list(series(all_rows)))  # of all rows, as in the table, also those that are not drawn
    for axes in panels:
        _draw(axes, rows, dense, score, styles)
    if zoom is not None:
        panels[1].set_ylim(zoom)
        panels[1].set_title("the same, near dense", fontsize=9, loc="left")
    panels[-1].set_xlabel(f"{timed_quantity(document.get('context') or {})} of a batch [ms], faster to the left")
    has_intervals = score is not None and (score.key == "top1" or _has_intervals(rows, score))
    below = [] if score is None else [f"{_BARS}; {_INTERVALS}" if has_intervals else _BARS]
    if slow:
        below.append(fill(f"Off the chart: {'; '.join(_describe(row, score) for row in slow)}.", 105))
    if dense is not None and dense.latency_ms:
        add_speedups(panels[0], dense.latency_ms)
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        plain = [handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle in handles]
        figure.legend(
            plain,
            labels,
            title="\n".join(below),  # above the entries: the layout would put a label of the figure on top of them
            title_fontsize=8,
            loc="outside lower center",
            ncols=_legend_columns(labels),
            fontsize=8,
            frameon=False,
        )
    elif below:
        figure.supxlabel("\n".join(below), fontsize=8, color=INK)
    figure.suptitle(_title(document, rows), fontsize=10)
    return figure


def _legend_columns(labels: Sequence[str]) -> int:
    """How many columns of the legend fit into the width of the figure."""
    longest = max(map(len, labels))
    return max(1, min(6, _LEGEND_LETTERS // (longest + _HANDLE_LETTERS)))


def _draw(axes: Axes, rows: Sequence[Row], dense: Row | None, score: Score | None, styles: _Styles) -> None:
    if dense is not None and dense.latency_ms is not None:
        _mark_dense(axes, dense, dense.latency_ms, score)
    if score is None:
        _note_unknown_accuracy(axes)
    else:
        _draw_front(axes, rows, score)
        _draw_lines(axes, series(rows), score, styles)
        axes.set_ylabel(f"{score.label} [%]" if score.is_share else score.label)
    axes.margins(0.06)
    if score is not None and score.lower_is_better:
        axes.invert_yaxis()  # up is better
    axes.grid(alpha=0.25)


def _slow(rows: Sequence[Row], dense: Row | None) -> list[Row]:
    """The rows that are too slow to be drawn."""
    limit = None if dense is None else dense.latency_ms
    if limit is None:
        return []
    return [row for row in rows if (row.latency_ms or 0.0) > _SLOW * limit]


def _describe(row: Row, score: Score | None) -> str:
    share = None if score is None else score.of(row)
    known = "" if share is None or score is None else f", {score.text(share)} {score.label}"
    return f"{row.variant}, {milliseconds(row.latency_ms)} ms{known}"


def _zoom(rows: Sequence[Row], dense: Row | None, score: Score | None) -> tuple[float, float] | None:
    """The y-limits of a second panel: around the rows in the best quarter of a wide range; None if few are."""
    own = None if dense is None else _share(dense, score)
    if own is None or score is None:
        return None
    sign = -1.0 if score.lower_is_better else 1.0
    best = sign * own
    heights = [score.scale * (score.rank(row) or 0.0) for row in rows if placed(row, score) and row is not dense]
    wide = _WIDE if score.is_share else 0.0  # points; the unit of another metric is not known
    if len(heights) < 4 or best - min(heights) <= wide:
        return None
    top = max(*heights, best)
    near = [height for height in heights if height >= top - (top - min(heights)) / 4]
    span = top - min(*near, best)
    if 2 * len(near) < len(heights) or not span or best < top - (top - min(heights)) / 4:
        return None
    return sign * (top - 1.25 * span), sign * (top + 0.25 * span)  # the better end is above


def _mark_dense(axes: Axes, dense: Row, latency: float, score: Score | None) -> None:
    axes.axvline(latency, color=_GREY, linewidth=0.8, linestyle=":")
    height = _share(dense, score)
    if height is None:
        return
    axes.axhline(height, color=_GREY, linewidth=0.8, linestyle=":")
    axes.errorbar(latency, height, xerr=_quartiles([dense]), color=INK, fmt="*", markersize=13, label="dense", zorder=5)


def _draw_lines(axes: Axes, lines: Mapping[str, Sequence[Row]], score: Score, styles: _Styles) -> None:
    for name, all_rows in lines.items():
        rows = sorted((row for row in all_rows if placed(row, score)), key=lambda row: -(row.latency_ms or 0.0))
        if not rows:
            continue
        color, marker, eight_bit = styles[name]
        latencies = [row.latency_ms or 0.0 for row in rows]
        heights = [score.scale * (score.of(row) or 0.0) for row in rows]
        axes.errorbar(
            latencies,
            heights,
            xerr=_quartiles(rows),
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


def _quartiles(rows: Sequence[Row]) -> np.ndarray:
    """Distances (2, rows) from each latency to its quartiles, in ms; 0 where they are not known.

    Results of before have half the distance between the quartiles only, and get no bar: it would have to be drawn to
    both sides alike, below what was ever measured.
    """
    ends = []
    for row in rows:
        middle = row.latency_ms or 0.0
        low = middle if row.latency_low_ms is None else row.latency_low_ms
        high = middle if row.latency_high_ms is None else row.latency_high_ms
        ends.append((max(middle - low, 0.0), max(high - middle, 0.0)))
    return np.array(ends).T


def _intervals(rows: Sequence[Row], score: Score) -> np.ndarray | None:
    """Distances (2, rows) from each point to the ends of its interval, as it is drawn; None if unknown."""
    if not _has_intervals(rows, score):
        return None
    ends = []
    for row in rows:
        low, change, high = row.top1_low, row.top1_change, row.top1_high
        if score.key == "metric":
            low, change, high = row.metric_low, row.metric_change, row.metric_high
        if low is None or change is None or high is None:
            ends.append((0.0, 0.0))
        else:
            ends.append((score.scale * max(change - low, 0.0), score.scale * max(high - change, 0.0)))
    return np.array(ends).T


def _has_intervals(rows: Sequence[Row], score: Score) -> bool:
    if score.key == "metric":
        return any(row.metric_low is not None for row in rows)
    return score.key == "top1" and any(interval_of(row) is not None for row in rows)


def _draw_front(axes: Axes, rows: Sequence[Row], score: Score) -> None:
    front = front_of(rows, score)
    if len(front) > 1:
        latencies = [row.latency_ms or 0.0 for row in front]
        heights = [score.scale * (score.of(row) or 0.0) for row in front]
        axes.plot(
            latencies,
            heights,
            color="#d5d8dc",
            linewidth=6,
            solid_capstyle="round",
            zorder=1,
            label="Pareto front",
        )


def _note_unknown_accuracy(axes: Axes) -> None:
    message = "No accuracy to show: the module logs no val/top1,\nand no agreement with dense was measured."
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", color=INK)
    axes.set_yticks([])


def _share(row: Row, score: Score | None) -> float | None:
    if score is None:
        return None
    value = 1.0 if score.key == "agreement" else score.of(row)  # dense agrees with itself
    return None if value is None else score.scale * float(value)


def _title(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    context = document.get("context") or {}
    row = {name: value for name, value in rows[0].to_dict().items() if value not in ("", None)}
    facts = {**row, **{name: value for name, value in context.items() if value is not None}}
    images = f"{rows[0].images} images" if rows[0].images else ""
    where = ", ".join(part for part in (context_line(facts), images) if part)
    return f"{model_title(facts)}\n{where}"
