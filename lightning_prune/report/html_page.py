"""The HTML report of a comparison."""

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

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
    percent,
    points,
    rows_of,
    score_of,
    series_name,
)


class Summary(NamedTuple):
    """Sentences of plain text.

    Attributes:
        findings: What was gained at which price, the most important first.
        cautions: Where nothing was gained, what could not be reached or is not known.
    """

    findings: list[str]
    cautions: list[str]


def summary(document: Mapping[str, Any]) -> Summary:
    """Says what the figures of a comparison say and no more.

    Args:
        document: What `compare` writes as `results.json`.

    Raises:
        DataError: If the document has no rows.

    Example:
        >>> dense = {"variant": "dense", "method": "", "top1": 0.9, "speedup": 1.0}
        >>> pruned = {"variant": "pomt given", "method": "pomt", "top1": 0.89, "speedup": 1.5}
        >>> summary({"rows": [dense, pruned]}).findings
        ['pomt given: 1.50x as fast as dense, 89.00% top-1, \u22121.00 points against dense.']
    """
    rows = rows_of(document)
    score, dense = score_of(rows), dense_of(rows)
    ranked = {target: group for target, group in by_target(rows, score).items() if target is not None}
    groups = {target: [row for row in group if not missed(row)] or group for target, group in ranked.items()}
    findings = [*_winners(groups, score), *(_at_target(target, group, score) for target, group in groups.items())]
    loose = [row for row in rows if row.target_speedup is None and row is not dense and row.speedup]
    findings += [_alone(row, dense, score) for row in loose]
    return Summary(
        [sentence for sentence in findings if sentence],
        [
            *_unknown_accuracy(score),
            *_not_faster(rows, dense),
            *_place_of("pomt", groups, score),
            *_beaten_by_random(groups, score),
            *_missed(rows),
            *_unreached(document),
        ],
    )


def _against_dense(row: Row, dense: Row | None) -> str:
    """` -0.80 points against dense (95% interval ...)`, with what the interval says; empty where nothing is known."""
    change, interval = change_of(row, dense), interval_of(row)
    if change is None:
        return ""
    said = f", {points(change)} points against dense"
    if interval is None:
        return said
    low, high = interval
    said += f" (95% interval {points(low)} to {points(high)})"
    return said + (": no difference that 95% would bear out" if low <= 0 <= high else "")


def _winners(groups: Mapping[float, Sequence[Row]], score: Score | None) -> list[str]:
    """The first sentence: who is ahead at how many targets."""
    won: dict[str, list[str]] = {}
    for target, group in groups.items():
        for row in _best(group, score):
            won.setdefault(series_name(row), []).append(f"{target:g}x")
    if not won:
        return []
    order = sorted(won.items(), key=lambda item: -len(item[1]))
    told = _listed([f"{name} at {len(at)} ({', '.join(at)})" for name, at in order])
    what = "accuracy" if score == TOP1 else "agreement with dense"
    return [f"Of {len(groups)} speed-up targets, the most {what} is kept by {told}."]


def _best(group: Sequence[Row], score: Score | None) -> list[Row]:
    """The rows of the best figure: several where it is the same."""
    known = [row for row in group if score is not None and score.of(row) is not None]
    return [row for row in known if score is not None and score.of(row) == score.of(known[0])]


def _at_target(target: float, group: Sequence[Row], score: Score | None) -> str:
    best = _best(group, score)
    if not best or score is None:
        return ""
    first = best[0]
    names = _listed([series_name(row) for row in best])
    said = f"At {target:g}x {names} kept the most: {percent(score.of(first))} {score.label}"
    said += _against_dense(first, None) + "."
    low = interval_of(first)
    if low is not None:
        close = [row for row in group if row not in best and (end := interval_of(row)) and end[1] >= low[0]]
        if close:
            names = _listed([f"{series_name(row)} ({percent(score.of(row))})" for row in close])
            said += f" Too close to call, for their intervals overlap with its: {names}."
    return said


def _alone(row: Row, dense: Row | None, score: Score | None) -> str:
    """A row without a target: a schedule that was planned or given, or int8."""
    speedup = row.speedup or 0.0
    figure = None if score is None else score.of(row)
    known = "" if figure is None or score is None else f", {percent(figure)} {score.label}"
    return f"{row.variant}: {speedup:.2f}x as fast as dense{known}{_against_dense(row, dense)}."


def _unknown_accuracy(score: Score | None) -> list[str]:
    if score is None:
        return ["Accuracy is not known: the module logs no val/top1. The speed-ups below say nothing of its price."]
    if score != TOP1:
        return ["The module logs no val/top1. Variants are ranked by agreement with dense."]
    return []


def _not_faster(rows: Sequence[Row], dense: Row | None) -> list[str]:
    """Variants whose speed-up is not beyond its own spread."""
    timed = [row for row in rows if row is not dense and row.speedup is not None]
    slow = [row for row in timed if (row.speedup or 0.0) - (row.speedup_spread or 0.0) <= 1]
    if timed and len(slow) == len(timed):
        return ["No variant is faster than dense by more than the spread of the timing: nothing is to be gained here."]
    return [_told_slow(row) for row in slow]


def _told_slow(row: Row) -> str:
    """Slower than dense, or faster by so little that another run might say otherwise."""
    variant, speedup = row.variant, row.speedup or 0.0
    if speedup <= 1:
        return f"{variant} does not help here: it is {speedup:.2f}x as fast as dense."
    spread = row.speedup_spread or 0.0
    return f"{variant} may not help here: it is {speedup:.2f}x as fast as dense, with a spread of {spread:.2f}."


def _place_of(method: str, groups: Mapping[float, Sequence[Row]], score: Score | None) -> list[str]:
    """Where the named method, the package's own choice, is not the best."""
    behind = []
    for target, group in groups.items():
        best = _best(group, score)
        known = [row for row in group if score is not None and score.of(row) is not None]
        own = next((row for row in known if series_name(row) == method), None)
        if score is None or own is None or own in best:
            continue
        figure = score.of(own) or 0.0
        place = 1 + sum((score.of(row) or 0.0) > figure for row in known)
        gap = 100 * ((score.of(best[0]) or 0.0) - figure)
        behind.append(f"place {place} of {len(known)} at {target:g}x, {gap:.2f} points behind {series_name(best[0])}")
    return [f"{method} is not the best everywhere: {'; '.join(behind)}."] if behind else []


def _beaten_by_random(groups: Mapping[float, Sequence[Row]], score: Score | None) -> list[str]:
    """Methods that end below the floor that each must beat."""
    beaten = []
    for target, group in groups.items():
        floor = next((row for row in group if series_name(row) == "random"), None)
        least = None if floor is None or score is None else score.of(floor)
        if least is None or score is None:
            continue
        for row in group:
            share = score.of(row)
            if share is not None and share < least and not series_name(row).startswith("random"):
                beaten.append(f"{series_name(row)} at {target:g}x ({percent(share)} against {percent(least)})")
    return [f"Removing tokens at random does better than {_listed(beaten)}."] if beaten else []


def _missed(rows: Sequence[Row]) -> list[str]:
    short = [f"{row.variant} ({row.speedup:.2f}x)" for row in rows if missed(row)]
    return [f"Targets that the final timing did not bear out: {_listed(short)}."] if short else []


def _unreached(document: Mapping[str, Any]) -> list[str]:
    """Targets beyond what a method can do."""
    told = []
    for entry in document.get("unreached") or []:
        target, best, reason = number(entry.get("target_speedup")), number(entry.get("best")), entry.get("reason")
        most = "" if best is None else f": at most {best:.2f}x"
        what = "its target" if target is None else f"{target:g}x"
        why = f" ({str(reason).rstrip('.')})" if reason else ""
        told.append(f"{entry.get('method')} cannot reach {what}{most}{why}.")
    return told


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


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
    figures = [figure for row in reached if score is not None and (figure := score.of(row)) is not None]
    for row in group:
        best = target is not None and score is not None and bool(figures) and row in reached
        best = best and score is not None and score.of(row) == max(figures)
        mark = ' class="best"' if best else ""
        cells = "".join(f"<td>{_cell(column, row)}</td>" for column in columns)
        name = escape(row.variant or "?").replace("+", "+<wbr>")
        lines.append(f'<tr{mark}><th scope="row">{name}</th>{cells}</tr>')
    return "<tbody>\n" + "\n".join(lines) + "\n</tbody>"


def _cell(column: _Column, row: Row) -> str:
    figure, below = column.cell(row)
    return (figure or "-") + (f"<small>{below}</small>" if below else "")


def _notes(rows: Sequence[Row]) -> str:
    noted = [row for row in rows if row.note]
    if not noted:
        return ""
    items = "\n".join(f"<li><b>{escape(row.variant)}</b>: {escape(row.note)}</li>" for row in noted)
    return f'<ul class="notes">\n{items}\n</ul>\n'


def _digits(row: Row, key: str, digits: int) -> str:
    figure = number(getattr(row, key, None))
    return "" if figure is None else f"{figure:.{digits}f}"


def _whole(row: Row, key: str) -> str:
    return _digits(row, key, 0)


def _share(row: Row, key: str) -> str:
    figure = number(getattr(row, key, None))
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
    blocks = row.block.split()
    if not blocks:
        return ""
    return f"block {escape(blocks[0])}" if len(blocks) == 1 else f"{len(blocks)} blocks"


def legend(document: Mapping[str, Any]) -> str:
    """What the marks in the table mean, as HTML."""
    rows = rows_of(document)
    said = ["±: half the distance between the quartiles."]
    if score_of(rows) == TOP1 and any(row.target_speedup is not None for row in rows):
        said.append("Bold: the best top-1 among the variants that reached a target.")
    if any(interval_of(row) for row in rows):
        said.append("Grey change: its interval holds 0, so it is no difference that 95% would bear out.")
    return f'<p class="legend">{" ".join(said)}</p>'


_STYLE = Path(__file__).parents[1] / "assets" / "report.css"

# File in the folder -> its heading, what a reader who does not see it is told, and a line below it.
_PICTURES = {
    "pareto.png": (
        "Accuracy against latency",
        "Plot of accuracy against measured latency, a line for each method; its figures are those of the table.",
        "Up and to the left is better. The dotted lines cross at the unpruned model.",
    ),
    "tokens.png": (
        "What each method keeps",
        "Pictures from the data, and beside each what every method keeps, merges and drops of its patches.",
        "A few images of the data. Each column names its variant and how many tokens it leaves.",
    ),
    "profile.png": (
        "How the schedule was chosen",
        "Plot of latency, accuracy proxy and objective against the number of tokens that are left.",
        "",
    ),
}

_READING = """<ul>
<li><b>Latency</b> is the time that the transformer takes for one batch. All variants were run in turn, in shuffled
rounds, so that drift of the machine meets all alike; shown is the median of the rounds and half the distance between
their quartiles. <b>Speed-up</b> is dense over variant, the median over rounds in which both ran.</li>
<li><b>Change</b> compares the variant with dense on the same images. Its 95% interval is for paired outcomes, so it
counts only the images that one of the two is right about and the other is not. An interval that holds 0 means that
these images do not show a difference; it does not mean that there is none.</li>
<li>The intervals compare with dense, not the methods with one another. Where those of two methods overlap, their order
may be chance. Among many rows, about one in twenty intervals misses the true change.</li>
<li>Every figure holds for the device, batch size and precision named here. Another device has other figures.</li>
</ul>"""


def write_page(document: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes `report.html`: summary in words, table, plots, schedules, the command and what was measured where.

    The page is one file without scripts; `pareto.png`, `tokens.png` and `profile.png` are put into it where the folder
    has them. It appears whole or not at all.

    Args:
        document: What `compare` writes as `results.json`.
        folder: Where; also where the pictures are.

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


def _page(document: Mapping[str, Any], folder: Path) -> str:
    rows = rows_of(document)
    context = document.get("context") or {}
    model, device = str(context.get("model") or "model"), str(context.get("device") or rows[0].device or "?")
    title = escape(f"Token reductions compared: {model} on {device}")
    style = _STYLE.read_text(encoding="utf-8")
    parts = [
        f"<h1>{title}</h1>",
        _facts(document, rows[0]),
        _summary(document),
        f"<h2>Results</h2>\n{table(document)}{legend(document)}",
        *(_picture(folder / name, *about) for name, about in _PICTURES.items() if (folder / name).is_file()),
        f"<h2>How to read this</h2>\n{_READING}",
        _schedules(document, folder),
        _command(document),
        _context(document, rows),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _facts(document: Mapping[str, Any], first: Row) -> str:
    """The line under the heading."""
    context = document.get("context") or {}
    threads = f"{context['threads']} threads" if context.get("device_type") == "cpu" and context.get("threads") else ""
    batch = context.get("batch_size") or first.batch_size
    facts = [
        threads,
        f"batch {batch}" if batch else "",
        context.get("precision") or first.precision,
        "compiled" if context.get("compiled") else "",
        f"{first.images} images" if first.images else "",
        str(document.get("started") or "").replace("T", " ")[:16],
    ]
    return f'<p class="facts">{escape(" · ".join(str(fact) for fact in facts if fact))}</p>'


def _summary(document: Mapping[str, Any]) -> str:
    found = summary(document)
    lists = [("What was found", found.findings), ("What to be careful about", found.cautions)]
    return "\n".join(f"<h2>{heading}</h2>\n{_items(sentences)}" for heading, sentences in lists if sentences)


def _items(sentences: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "\n</ul>"


def _picture(path: Path, heading: str, told: str, below: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = f"<figcaption>{below}</figcaption>" if below else ""
    return (
        f'<h2>{heading}</h2>\n<figure>\n<div class="wide" role="region" aria-label="{heading}" tabindex="0">'
        f'<img class="{path.stem}" alt="{told}" src="data:image/png;base64,{data}"></div>\n{caption}\n</figure>'
    )


def _schedules(document: Mapping[str, Any], folder: Path) -> str:
    """What each variant removes where, to copy into a file for `--prune.schedule`."""
    entries = []
    for name, variant in (document.get("variants") or {}).items():
        schedule = variant.get("schedule") or {}
        text = yaml.safe_dump(schedule, sort_keys=False, default_flow_style=None, width=72)
        about = [f"method {variant['method']}" if variant.get("method") else ""]
        about += [f"{key} = {value}" for key, value in (variant.get("settings") or {}).items()]
        about += [str(variant[key]) for key in ("reason", "note") if variant.get(key)]
        said = escape(". ".join(part.rstrip(".") for part in about if part))
        entries.append(
            f"<details>\n<summary><b>{escape(str(name))}</b> {escape(_short(schedule))}</summary>\n"
            + (f"<p>{said}.</p>\n" if said else "")
            + f"<pre>{escape(text)}</pre>\n</details>"
        )
    if not entries:
        return ""
    beside = " They are also the files in <code>schedules/</code>." if (folder / "schedules").is_dir() else ""
    how = f"<p>Saved as a file, each can be given to <code>--prune.schedule</code>.{beside}</p>"
    return f"<h2>Schedules</h2>\n{how}\n" + "\n".join(entries)


def _short(schedule: Mapping[str, Any]) -> str:
    """The schedule in a line."""
    removed = {block: count for block, count in enumerate(schedule.get("removed") or []) if count}
    if not removed:
        return ""
    where = ", ".join(f"{count} at block {block}" for block, count in removed.items())
    if len(removed) > 2 and len(set(removed.values())) == 1:
        where = f"{next(iter(removed.values()))} at each of {len(removed)} blocks"
    return f"removes {where}"


def _command(document: Mapping[str, Any]) -> str:
    command = document.get("command")
    return f"<h2>Command</h2>\n<pre>{escape(str(command))}</pre>" if command else ""


def _context(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Everything that the figures depend on, as it was recorded."""
    facts: dict[str, Any] = dict(document.get("context") or {})
    dense = dense_of(rows)
    facts["images"] = None if dense is None else dense.images
    facts["energy"] = document.get("energy")
    facts["started"] = document.get("started")
    seconds = number(document.get("seconds"))
    facts["planning and timing"] = None if seconds is None else f"{seconds:.0f} s"
    lines = [
        f'<tr><th scope="row">{escape(str(name).replace("_", " "))}</th><td>{escape(_plain(value))}</td></tr>'
        for name, value in facts.items()
        if value is not None
    ]
    table = '<table class="context">\n<tbody>\n' + "\n".join(lines) + "\n</tbody>\n</table>"
    return f"<h2>Measured on</h2>\n{table}" if lines else ""


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
