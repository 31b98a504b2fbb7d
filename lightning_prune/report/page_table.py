"""The table of a comparison as HTML: a section for each target, best first."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from lightning_prune.report.rows import (
    TOP1,
    Row,
    Score,
    by_target,
    change_of,
    dense_of,
    interval_of,
    missed,
    number,
    points,
    rows_of,
    score_of,
)


class _Column(NamedTuple):
    """A column of figures.

    Attributes:
        heading: What it shows, and in which unit.
        cell: HTML of a row's figure, and of the small line below it; both empty where it is not known.
    """

    heading: str
    cell: Callable[[Row], tuple[str, str]]


def table(document: Mapping[str, Any]) -> str:
    """The table, with the columns that any row has a figure for.

    Args:
        document: What `compare` writes as `results.json`.

    Raises:
        DataError: If the document has no rows.
    """
    rows = rows_of(document)
    score = score_of(rows)
    columns = [each for each in _columns(dense_of(rows)) if any(each.cell(row)[0] for row in rows)]
    groups = by_target(rows, score)
    sections = "\n".join(_section(target, group, columns, score, len(groups) > 1) for target, group in groups.items())
    headings = "".join(f'<th scope="col">{heading}</th>' for heading, _ in columns)
    return (
        '<div class="wide" role="region" aria-label="Results" tabindex="0">\n<table class="results">\n'
        f'<thead><tr><th scope="col">variant</th>{headings}</tr></thead>\n{sections}\n</table>\n</div>\n{_notes(rows)}'
    )


def _columns(dense: Row | None) -> list[_Column]:
    return [
        _Column("top-1 %", lambda row: (_share(row, "top1"), "")),
        _Column("change, points<br>95% interval", lambda row: _change(row, dense)),
        _Column("speed-up", lambda row: _with_spread(row, "speedup", "" if row is dense else "speedup_spread", "x")),
        _Column("latency<br>ms a batch", lambda row: _with_spread(row, "latency_ms", "latency_spread", "")),
        _Column("tokens<br>left", lambda row: (_whole(row, "tokens"), "")),
        _Column("tokens<br>removed", lambda row: (_whole(row, "removed"), _blocks(row))),
        _Column("same class<br>as dense %", lambda row: (_share(row, "agreement"), "")),
        _Column("top-5 %", lambda row: (_share(row, "top5"), "")),
        _Column("images/s<br>end to end", lambda row: (_whole(row, "throughput"), _end_to_end(row))),
        _Column("J/image<br>watts", lambda row: (_digits(row, "joules_per_image", 3), _digits(row, "watts", 1))),
    ]


def _section(
    target: float | None, group: Sequence[Row], columns: Sequence[_Column], score: Score | None, headed: bool
) -> str:
    lines = []
    if headed:
        title = "No target" if target is None else f"Target {target:g}x"
        span = f'colspan="{len(columns) + 1}" scope="rowgroup"'
        lines.append(f'<tr class="group"><th {span}><span>{title}</span></th></tr>')
    reached = [row for row in group if not missed(row)]
    figures = [figure for row in reached if score is not None and (figure := number(row, score.key)) is not None]
    for row in group:
        best = target is not None and score is not None and bool(figures) and row in reached
        best = best and score is not None and number(row, score.key) == max(figures)
        mark = ' class="best"' if best else ""
        cells = "".join(f"<td>{_cell(column, row)}</td>" for column in columns)
        name = escape(str(row.get("variant", "?"))).replace("+", "+<wbr>")
        lines.append(f'<tr{mark}><th scope="row">{name}</th>{cells}</tr>')
    return "<tbody>\n" + "\n".join(lines) + "\n</tbody>"


def _cell(column: _Column, row: Row) -> str:
    figure, below = column.cell(row)
    return (figure or "-") + (f"<small>{below}</small>" if below else "")


def _notes(rows: Sequence[Row]) -> str:
    noted = [row for row in rows if row.get("note")]
    if not noted:
        return ""
    items = "\n".join(f"<li><b>{escape(str(row.get('variant')))}</b>: {escape(str(row['note']))}</li>" for row in noted)
    return f'<ul class="notes">\n{items}\n</ul>\n'


def _digits(row: Row, key: str, digits: int) -> str:
    figure = number(row, key)
    return "" if figure is None else f"{figure:.{digits}f}"


def _whole(row: Row, key: str) -> str:
    return _digits(row, key, 0)


def _share(row: Row, key: str) -> str:
    figure = number(row, key)
    return "" if figure is None else f"{100 * figure:.2f}"


def _change(row: Row, dense: Row | None) -> tuple[str, str]:
    change, interval = change_of(row, dense), interval_of(row)
    if row is dense or change is None:
        return "", ""
    if interval is None:
        return points(change), ""
    low, high = interval
    kind = "even" if low <= 0 <= high else "less" if high < 0 else "more"
    return f'<span class="{kind}">{points(change)}</span>', f"{points(low)} to {points(high)}"


def _with_spread(row: Row, key: str, spread_key: str, unit: str) -> tuple[str, str]:
    figure, spread = _digits(row, key, 2), _digits(row, spread_key, 2)
    return (figure + unit if figure else ""), (f"±{spread}" if figure and spread else "")


def _end_to_end(row: Row) -> str:
    rate = _whole(row, "throughput_end_to_end")
    return f"({rate})" if rate else ""


def _blocks(row: Row) -> str:
    """Where tokens go, short enough for a cell."""
    blocks = str(row.get("block") or "").split()
    if not blocks:
        return ""
    return f"block {escape(blocks[0])}" if len(blocks) == 1 else f"{len(blocks)} blocks"


def legend(document: Mapping[str, Any]) -> str:
    """What the marks in the table mean, as HTML."""
    rows = rows_of(document)
    said = ["±: half the distance between the quartiles."]
    if score_of(rows) == TOP1 and any(number(row, "target") is not None for row in rows):
        said.append("Bold: the best top-1 among the variants that reached a target.")
    if any(interval_of(row) for row in rows):
        said.append("Grey change: its interval holds 0, so it is no difference that 95% would bear out.")
    return f'<p class="legend">{" ".join(said)}</p>'
