"""The report of a comparison: one page that needs nothing beside itself."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.files import replacing
from lightning_prune.report.page_table import legend, table
from lightning_prune.report.rows import Row, dense_of, number, rows_of
from lightning_prune.report.words import summary

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
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _page(document: Mapping[str, Any], folder: Path) -> str:
    rows = rows_of(document)
    context = document.get("context") or {}
    model, device = str(context.get("model") or "model"), str(context.get("device") or rows[0].get("device") or "?")
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
    batch = context.get("batch_size") or first.get("batch_size")
    facts = [
        threads,
        f"batch {batch}" if batch else "",
        context.get("precision") or first.get("precision"),
        "compiled" if context.get("compiled") else "",
        f"{first['images']} images" if first.get("images") else "",
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
    facts["images"] = None if dense is None else dense.get("images")
    facts["energy"] = document.get("energy")
    facts["started"] = document.get("started")
    seconds = number(document, "seconds")
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
