"""The table of the HTML report: its columns, the text of each cell, and the colour that a variant has in the plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from lightning_prune._utils import formatting
from lightning_prune.report.rows import (
    TOP1,
    Row,
    Score,
    by_target,
    change_of,
    dense_of,
    interval_of,
    metric_score,
    missed,
    score_of,
    series,
    series_name,
)
from lightning_prune.report.styles import INK, line_styles


class Cell(NamedTuple):
    """A figure of a row, with a small second line and a CSS class; an empty text is an unknown figure."""

    text: str
    below: str = ""
    kind: str = ""


class Column(NamedTuple):
    """A column of figures: its heading, the heading of the second line, and the cell of a row."""

    heading: str
    below: str
    cell: Callable[[Row], Cell]

    @property
    def label(self) -> str:
        """The heading in a line, for narrow screens, where it stands before each figure."""
        return f"{self.heading} {self.below}".strip()


class Line(NamedTuple):
    """A row of the table; `color` and `hollow` are those of its markers in `pareto.png`."""

    name: str
    color: str
    hollow: bool
    best: bool
    cells: list[Cell]


class Section(NamedTuple):
    """The rows of one target."""

    title: str
    lines: list[Line]


def points(change: float | None) -> str:
    """A change in points, with a minus that is as wide as the plus; a dash where it is not known."""
    return "-" if change is None else formatting.points(change).replace("-", "\u2212")


def change_text(change: float | None, score: Score) -> str:
    """A change in a score, with a minus that is as wide as the plus; a dash where it is not known."""
    return score.change_text(change).replace("-", "\u2212") if change is not None else "-"


def interval_text(interval: tuple[float, float] | None) -> str:
    """An interval of a change in points; a dash where it is not known."""
    return "-" if interval is None else f"{points(interval[0])} to {points(interval[1])}"


def ratio(speedup: float | None) -> str:
    """A target speed-up, with as many digits as were given; a dash where it is not known."""
    return "-" if speedup is None else f"{speedup:g}x"


def breakable(name: str) -> Markup:
    """A name that may be broken after each plus."""
    return escape(name).replace("+", Markup("+<wbr>"))


def _digits(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(share: float | None) -> Cell:
    return Cell("" if share is None else formatting.percent(share))


def _change(row: Row, dense: Row | None) -> Cell:
    change, interval = change_of(row, dense), interval_of(row)
    if row is dense or change is None:
        return Cell("")
    if interval is None:
        return Cell(points(change))
    kind = "even" if interval[0] <= 0 <= interval[1] else "less" if interval[1] < 0 else "more"
    return Cell(points(change), interval_text(interval), kind)


def _metric(row: Row) -> Cell:
    score = metric_score(row.metric_name)
    if row.metric is None:
        return Cell("")
    if row.metric_change is None:
        return Cell(score.text(row.metric))
    interval = ""
    if row.metric_low is not None and row.metric_high is not None:
        interval = f" ({score.change_text(row.metric_low)} to {score.change_text(row.metric_high)})"
    return Cell(score.text(row.metric), f"{change_text(row.metric_change, score)}{interval}")


def _worst_group(row: Row) -> Cell:
    if row.worst_group_accuracy is None:
        return Cell("")
    images = _digits(row.worst_group_images)
    known = ", ".join(filter(None, (row.worst_group, f"{images} images" if images else "")))
    return Cell(formatting.percent(row.worst_group_accuracy), known)


def _worst_class(row: Row) -> Cell:
    return Cell(row.worst_class, points(row.worst_class_change)) if row.worst_class else Cell("")


def _with_spread(text: str, known: bool, spread: float | None) -> Cell:
    if not known:
        return Cell("")
    if spread is None:
        return Cell(text)
    return Cell(text, f"±{spread:.2f}" if spread >= 0.005 else "±<0.01")


def _blocks(row: Row) -> str:
    blocks = row.block.split()
    if not blocks:
        return ""
    return f"block {blocks[0]}" if len(blocks) == 1 else f"{len(blocks)} blocks"


def columns_of(rows: Sequence[Row], quantity: str = "latency") -> list[Column]:
    """The columns in which at least one row has a figure.

    Args:
        rows: All rows of the table.
        quantity: What the milliseconds are, see `timed_quantity`.
    """
    several = len({row.runtime for row in rows}) > 1  # one runtime is a fact of the whole page
    differs = any(row.speedup_vs_eager not in (None, row.speedup) for row in rows)

    def speedup(row: Row) -> Cell:
        spread = None if row is dense_of(rows, row) else row.speedup_spread
        return _with_spread(formatting.speedup(row.speedup), row.speedup is not None, spread)

    def against_eager(row: Row) -> Cell:
        known = differs and row.speedup_vs_eager is not None
        return Cell(formatting.speedup(row.speedup_vs_eager) if known else "")

    def latency(row: Row) -> Cell:
        return _with_spread(formatting.milliseconds(row.latency_ms), row.latency_ms is not None, row.latency_spread)

    def rate(row: Row) -> Cell:
        whole = _digits(row.throughput_end_to_end)
        return Cell(_digits(row.throughput), f"({whole})" if whole else "")

    columns = [
        Column("top-1", "", lambda row: _share(row.top1)),
        Column("change, points", "95% interval", lambda row: _change(row, dense_of(rows, row))),
        Column(next((row.metric_name for row in rows if row.metric_name), "metric"), "change", _metric),
        Column("speed-up", "", speedup),
        Column(quantity, "ms a batch", latency),
        Column(
            "p90",
            "ms a batch",
            lambda row: Cell("" if row.latency_p90_ms is None else formatting.milliseconds(row.latency_p90_ms)),
        ),
        Column("runtime", "", lambda row: Cell(row.runtime if several else "")),
        Column("speed-up", "over eager", against_eager),
        Column("tokens", "left", lambda row: Cell(_digits(row.tokens))),
        Column("tokens", "removed", lambda row: Cell(_digits(row.removed), _blocks(row))),
        Column("same class", "as dense", lambda row: _share(row.agreement)),
        Column("worst class", "change, points", _worst_class),
        Column("worst group", "accuracy, images", _worst_group),
        Column("worst group", "change, points", lambda row: Cell(points(row.worst_group_change))),
        Column("top-5", "", lambda row: _share(row.top5)),
        Column("images/s later,", "in validation (end to end)", rate),
        Column("GMACs", "MiB", lambda row: Cell(_digits(row.gmacs, 2), _digits(row.peak_memory_mib, 0))),
        Column("J/image", "watts", lambda row: Cell(_digits(row.joules_per_image, 3), _digits(row.watts, 1))),
    ]
    return [column for column in columns if any(column.cell(row).text for row in rows)]


def sections_of(rows: Sequence[Row], columns: Sequence[Column], score: Score | None) -> list[Section]:
    """The rows under their targets; those without a target come first.

    Args:
        rows: All rows of the table.
        columns: The columns.
        score: The figure that ranks the rows of a target.
    """
    styles = {**line_styles(list(series(rows))), "": (INK, "*", False)}
    return [_section(target, group, columns, score, styles) for target, group in by_target(rows, score).items()]


def _section(
    target: float | None,
    group: Sequence[Row],
    columns: Sequence[Column],
    score: Score | None,
    styles: Mapping[str, tuple[str, str, bool]],
) -> Section:
    reached = [row for row in group if not missed(row)]
    figures = [figure for row in reached if score is not None and (figure := score.rank(row)) is not None]
    lines = []
    for row in group:
        figure = None if score is None or target is None or missed(row) else score.rank(row)
        best = figure is not None and figure == max(figures) and _is_certain(row, reached)
        cells = [column.cell(row) for column in columns]
        color, _, hollow = styles[series_name(row)]
        lines.append(Line(row.variant or "?", color, hollow, best, cells))
    return Section("No target" if target is None else f"Target {ratio(target)}", lines)


def _is_certain(row: Row, reached: Sequence[Row]) -> bool:
    """Whether the 95% interval of the best row lies above those of all others, where they are known."""
    own = interval_of(row)
    others = [known for other in reached if other is not row and (known := interval_of(other)) is not None]
    return own is None or all(other[1] < own[0] for other in others)


def legend_of(rows: Sequence[Row], processes: int = 1) -> list[str]:
    """The sentences below the table.

    Args:
        rows: All rows.
        processes: How many validated together.
    """
    lines = ["±: half the distance between the quartiles."]
    if score_of(rows) == TOP1 and any(row.target_speedup is not None for row in rows):
        lines.append(
            "Bold: the best top-1 of the variants that reach the target, where its interval lies above all others."
        )
    if any(row.throughput is not None for row in rows):
        lines.append("images/s: of the validation, after the latency was timed, when the machine may differ in speed.")
        if processes > 1:
            lines.append(f"images/s is that of all {processes} processes together, latency that of one.")
    if any(interval_of(row) for row in rows):
        lines.append("Grey change: the 95% interval holds 0.")
    return lines
