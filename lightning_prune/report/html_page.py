"""The HTML report of a comparison: one file without scripts, links or other files."""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lightning_prune._utils import formatting
from lightning_prune._utils.files import atomic_write
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
    rows_of,
    score_of,
)
from lightning_prune.report.summary import Summary, UnreachedTarget, summarise

_TEMPLATE = "comparison.html"

# File in the folder -> its heading, its description for readers who do not see it, and a caption.
_PICTURES = {
    "pareto.png": (
        "Accuracy against latency",
        "Plot of accuracy against measured latency with a line for each method; the table has the same figures.",
        "Up and to the left is better. The dotted lines cross at the dense model.",
    ),
    "tokens.png": (
        "What each method keeps",
        "A few images, and for each variant the patches that it keeps, merges and drops.",
        "A few images of the data. Each column names its variant and the number of tokens left.",
    ),
    "profile.png": (
        "Latency profile",
        "Plot of measured latency against the number of tokens.",
        "",
    ),
}


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


class Line(NamedTuple):
    """A row of the table."""

    name: str
    best: bool
    cells: list[Cell]


class Section(NamedTuple):
    """The rows of one target."""

    title: str
    lines: list[Line]


class Picture(NamedTuple):
    """A picture as base64."""

    name: str
    heading: str
    alt: str
    caption: str
    data: str


class SavedSchedule(NamedTuple):
    """The schedule of a variant, as it is saved."""

    name: str
    removes: str
    about: str
    text: str


def _minus(text: str) -> str:
    """With a minus that is as wide as the plus."""
    return text.replace("-", "\u2212")


def _points(change: float | None) -> str:
    return "-" if change is None else _minus(formatting.points(change))


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{_points(interval[0])} to {_points(interval[1])}"


def _ratio(speedup: float | None) -> str:
    """A target, with as many digits as were given."""
    return "-" if speedup is None else f"{speedup:g}x"


def _breakable(name: str) -> Markup:
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
        return Cell(_points(change))
    kind = "even" if interval[0] <= 0 <= interval[1] else "less" if interval[1] < 0 else "more"
    return Cell(_points(change), _interval(interval), kind)


def _with_spread(text: str, known: bool, spread: float | None) -> Cell:
    return Cell(text, f"±{spread:.2f}" if spread is not None else "") if known else Cell("")


def _blocks(row: Row) -> str:
    blocks = row.block.split()
    if not blocks:
        return ""
    return f"block {blocks[0]}" if len(blocks) == 1 else f"{len(blocks)} blocks"


def _columns(rows: Sequence[Row], dense: Row | None) -> list[Column]:
    several = len({row.runtime for row in rows}) > 1  # one runtime is a fact of the whole page

    def speedup(row: Row) -> Cell:
        spread = None if row is dense else row.speedup_spread
        return _with_spread(formatting.speedup(row.speedup), row.speedup is not None, spread)

    def latency(row: Row) -> Cell:
        return _with_spread(formatting.milliseconds(row.latency_ms), row.latency_ms is not None, row.latency_spread)

    def rate(row: Row) -> Cell:
        whole = _digits(row.throughput_end_to_end)
        return Cell(_digits(row.throughput), f"({whole})" if whole else "")

    return [
        Column("top-1", "", lambda row: _share(row.top1)),
        Column("change, points", "95% interval", lambda row: _change(row, dense)),
        Column("speed-up", "", speedup),
        Column("latency", "ms a batch", latency),
        Column(
            "p90",
            "ms a batch",
            lambda row: Cell("" if row.latency_p90_ms is None else formatting.milliseconds(row.latency_p90_ms)),
        ),
        Column("runtime", "", lambda row: Cell(row.runtime if several else "")),
        Column("tokens", "left", lambda row: Cell(_digits(row.tokens))),
        Column("tokens", "removed", lambda row: Cell(_digits(row.removed), _blocks(row))),
        Column("same class", "as dense", lambda row: _share(row.agreement)),
        Column("top-5", "", lambda row: _share(row.top5)),
        Column("images/s", "end to end", rate),
        Column("J/image", "watts", lambda row: Cell(_digits(row.joules_per_image, 3), _digits(row.watts, 1))),
    ]


def _section(target: float | None, group: Sequence[Row], columns: Sequence[Column], score: Score | None) -> Section:
    reached = [row for row in group if not missed(row)]
    figures = [figure for row in reached if score is not None and (figure := score.of(row)) is not None]
    lines = []
    for row in group:
        figure = None if score is None or target is None or missed(row) else score.of(row)
        best = figure is not None and figure == max(figures)
        lines.append(Line(row.variant or "?", best, [column.cell(row) for column in columns]))
    return Section("No target" if target is None else f"Target {_ratio(target)}", lines)


def _legend(rows: Sequence[Row]) -> list[str]:
    lines = ["±: half the distance between the quartiles."]
    if score_of(rows) == TOP1 and any(row.target_speedup is not None for row in rows):
        lines.append("Bold: the best top-1 of the variants that reach the target.")
    if any(interval_of(row) for row in rows):
        lines.append("Grey change: the 95% interval holds 0.")
    return lines


def _unreached_target(entry: UnreachedTarget) -> str:
    target = f" {_ratio(entry.target)}" if entry.target is not None else ""
    best = f": at most {formatting.speedup(entry.best)}" if entry.best is not None else ""
    reason = f" ({entry.reason.rstrip('.')})" if entry.reason else ""
    return f"{entry.method}{target}{best}{reason}"


def _warnings(summary: Summary, variants: int) -> list[tuple[str, list[str]]]:
    """Label -> variants with the figure that it is about."""

    def with_speedup(rows: Sequence[Row]) -> list[str]:
        return [f"{row.variant} ({formatting.speedup(row.speedup)})" for row in rows]

    def with_score(row: Row) -> str:
        return formatting.percent(None if summary.score is None else summary.score.of(row))

    nothing = len(summary.not_faster) == variants
    slow = "No variant is faster than dense" if nothing else "Not faster than dense"
    found = {
        f"{slow} by more than the spread of the timing": with_speedup(summary.not_faster),
        "Worse than random tokens at the same target": [
            f"{row.variant} ({with_score(row)}, random {with_score(floor)})" for row, floor in summary.below_random
        ],
        "Slower than the target in the final timing": with_speedup(summary.missed),
        "Target cannot be reached": [_unreached_target(entry) for entry in summary.unreached],
    }
    return [(label, entries) for label, entries in found.items() if entries]


def _best_of(summary: Summary, dense: Row | None) -> list[dict[str, Any]]:
    """The table of the best variants: for each target its names and figures."""
    return [
        {
            "target": _ratio(target.speedup),
            "best": ", ".join(row.variant for row in target.best),
            "score": formatting.percent(None if summary.score is None else summary.score.of(target.best[0])),
            "change": _points(change_of(target.best[0], dense)),
            "interval": _interval(interval_of(target.best[0])),
            "overlapping": ", ".join(row.variant for row in target.overlapping) or "-",
        }
        for target in summary.targets
    ]


def _facts(document: Mapping[str, Any], first: Row) -> str:
    """The line below the heading."""
    row = {"device": first.device, "batch_size": first.batch_size, "precision": first.precision}
    context = {**row, **{name: value for name, value in (document.get("context") or {}).items() if value is not None}}
    images = f"{first.images} images" if first.images else ""
    started = str(document.get("started") or "").replace("T", " ")[:16]
    return ", ".join(part for part in (formatting.context_line(context), images, started) if part)


def _pictures(folder: Path) -> list[Picture]:
    return [
        Picture(Path(name).stem, heading, alt, caption, base64.b64encode((folder / name).read_bytes()).decode("ascii"))
        for name, (heading, alt, caption) in _PICTURES.items()
        if (folder / name).is_file()
    ]


def _removes(schedule: Mapping[str, Any]) -> str:
    """A schedule in a line."""
    removed = {block: count for block, count in enumerate(schedule.get("removed") or []) if count}
    if not removed:
        return ""
    if len(removed) > 2 and len(set(removed.values())) == 1:
        return f"removes {next(iter(removed.values()))} at each of {len(removed)} blocks"
    return "removes " + ", ".join(f"{count} at block {block}" for block, count in removed.items())


def _schedules(document: Mapping[str, Any]) -> list[SavedSchedule]:
    entries = []
    for name, variant in (document.get("variants") or {}).items():
        schedule = variant.get("schedule") or {}
        about = [f"method {variant['method']}" if variant.get("method") else ""]
        about += [f"{key} = {value}" for key, value in (variant.get("settings") or {}).items()]
        about += [str(variant[key]) for key in ("reason", "note") if variant.get(key)]
        text = ". ".join(part.rstrip(".") for part in about if part)
        saved = yaml.safe_dump(schedule, sort_keys=False, default_flow_style=None, width=72)
        entries.append(SavedSchedule(str(name), _removes(schedule), f"{text}." if text else "", saved))
    return entries


def _context(document: Mapping[str, Any], dense: Row | None) -> list[tuple[str, str]]:
    """Everything that the figures depend on."""
    seconds = number(document.get("seconds"))
    facts: dict[str, Any] = {
        **(document.get("context") or {}),
        "images": None if dense is None else dense.images,
        "energy": document.get("energy"),
        "started": document.get("started"),
        "planning and timing": None if seconds is None else f"{seconds:.0f} s",
    }
    return [(str(name).replace("_", " "), _plain(value)) for name, value in facts.items() if value is not None]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _page(document: Mapping[str, Any], folder: Path) -> str:
    rows = rows_of(document)
    dense, score, summary = dense_of(rows), score_of(rows), summarise(document)
    context = document.get("context") or {}
    model, device = str(context.get("model") or "model"), str(context.get("device") or rows[0].device or "?")
    columns = [column for column in _columns(rows, dense) if any(column.cell(row).text for row in rows)]
    environment = Environment(
        loader=PackageLoader("lightning_prune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(_TEMPLATE).render(
        title=f"Token reductions compared: {model} on {device}",
        facts=_facts(document, rows[0]),
        score=score,
        top1=TOP1,
        best_of=_best_of(summary, dense),
        warnings=_warnings(summary, len(rows) - (dense is not None)),
        columns=columns,
        sections=[_section(target, group, columns, score) for target, group in by_target(rows, score).items()],
        breakable=_breakable,
        notes=[(row.variant, row.note) for row in rows if row.note],
        legend=_legend(rows),
        pictures=_pictures(folder),
        schedules=_schedules(document),
        schedules_folder=(folder / "schedules").is_dir(),
        command=str(document.get("command") or ""),
        context=_context(document, dense),
    )


def write_page(document: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes `report.html`: the best variants, the table, plots, schedules, the command and what was measured on.

    `pareto.png`, `tokens.png` and `profile.png` become part of the page if the folder has them. The page appears whole
    or not at all.

    Args:
        document: What `compare` writes as `results.json`.
        folder: Folder of the page and the pictures.

    Returns:
        The path of the page.

    Raises:
        DataError: If the document has no rows.

    Example:
        >>> dense = {"variant": "dense", "method": "", "top1": 0.9, "latency_ms": 20.0, "speedup": 1.0}
        >>> pruned = {"variant": "pomt 1.5x", "method": "pomt", "top1": 0.89, "latency_ms": 13.3, "speedup": 1.5}
        >>> write_page({"rows": [dense, pruned]}, ".").name
        'report.html'
    """
    path = Path(folder) / "report.html"
    page = _page(document, Path(folder))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
