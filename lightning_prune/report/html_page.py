"""The HTML report of a comparison: one file without scripts, links or other files."""

import base64
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_prune._utils import formatting
from lightning_prune._utils.files import atomic_write, user_path
from lightning_prune.profiling.model_identity import UNKNOWN
from lightning_prune.report.class_table import SHOWN, losing_classes
from lightning_prune.report.html_table import (
    breakable,
    change_text,
    columns_of,
    interval_text,
    legend_of,
    ratio,
    sections_of,
)
from lightning_prune.report.rows import (
    TOP1,
    Row,
    change_of,
    dense_of,
    interval_of,
    number,
    processes_of,
    rows_of,
    runtime_suffix,
    score_of,
)
from lightning_prune.report.summary import Summary, UnreachedTarget, summarise

_TEMPLATE = "comparison.html"

# File in the folder -> its heading, its alternative text, and its caption.
_PICTURES = {
    "pareto.png": (
        "Accuracy against latency",
        "Plot of accuracy against measured latency with a line for each method; the table has its figures and colours.",
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


def _unreached_target(entry: UnreachedTarget) -> str:
    target = f" {ratio(entry.target)}" if entry.target is not None else ""
    best = f": at most {formatting.speedup(entry.best)}" if entry.best is not None else ""
    reason = f" ({entry.reason.rstrip('.')})" if entry.reason else ""
    return f"{entry.method}{target}{best}{reason}"


def _warnings(summary: Summary, variants: int) -> list[tuple[str, list[str]]]:
    """Label -> variants with the figure that it is about."""

    def with_speedup(rows: Sequence[Row]) -> list[str]:
        return [f"{row.variant} ({formatting.speedup(row.speedup)})" for row in rows]

    def with_score(row: Row) -> str:
        return "-" if summary.score is None else summary.score.text(summary.score.of(row))

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


def _best_of(summary: Summary, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table of the best variants: for each target its names and figures."""
    score = summary.score or TOP1  # without a score there are no targets
    return [
        {
            "target": f"{ratio(target.speedup)} {target.runtime}".rstrip(),
            "best": ", ".join(row.variant for row in target.best),
            "score": score.text(score.of(target.best[0])),
            "change": change_text(change_of(target.best[0], dense_of(rows, target.best[0]), score), score),
            "interval": interval_text(interval_of(target.best[0])),
            "overlapping": ", ".join(row.variant for row in target.overlapping) or "-",
        }
        for target in summary.targets
    ]


class Deployed(NamedTuple):
    """The variant to deploy, and how to run it from the folder of the report."""

    heading: str
    variant: str
    reason: str
    command: str


_KEPT_OPTIONS = ("--config", "--model", "--data", "--trainer")  # of a comparison: they hold for its best variant too


def _deployed(document: Mapping[str, Any]) -> Deployed | None:
    """The best variant by the objective that was stated; None where none was stated."""
    best = document.get("best")
    if not best:
        return None
    heading = "Deploy this one" if best.get("met", True) else "No variant meets the objective"
    variant = str(best.get("variant") or "")
    row = next((row for row in rows_of(document) if row.variant == variant), Row())
    is_default = row.runtime in ("", UNKNOWN) or (row.runtime == "torch" and not runtime_suffix(row))
    command = _deploying(str(document.get("command") or ""), "" if is_default else row.runtime)
    return Deployed(heading, variant, str(best.get("reason") or ""), command)


def _deploying(command: str, runtime: str) -> str:
    """The command that validates `schedule.yaml` with the model and data of a comparison; else the line of Python.

    Args:
        command: That of the comparison.
        runtime: Of the variant; empty for that of the command.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation mark that is never closed
        words = []
    if words[:2] != ["lightning-prune", "compare"]:
        return 'lightning_prune.patch(model, "schedule.yaml")'
    kept, keep = [], False
    for word in words[2:]:
        if word.startswith("-"):
            keep = word.startswith(_KEPT_OPTIONS)
        if keep:
            kept.append(word)
    runs_in = ["--prune.runtime", runtime] if runtime else []
    return shlex.join(["lightning-prune", "validate", *kept, *runs_in, "--prune.schedule", "schedule.yaml"])


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
    model, device = formatting.model_title(context), str(context.get("device") or rows[0].device or "?")
    columns = columns_of(rows, formatting.timed_quantity(context))
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
        change="change, points" if score is None or score.is_share else "change",
        deployed=_deployed(document),
        best_of=_best_of(summary, rows),
        warnings=_warnings(summary, sum(row is not dense_of(rows, row) for row in rows)),
        columns=columns,
        sections=sections_of(rows, columns, score),
        breakable=breakable,
        notes=[(row.variant, row.note) for row in rows if row.note],
        legend=legend_of(rows, processes_of(document)),
        classes=losing_classes(document),
        classes_shown=SHOWN,
        pictures=_pictures(folder),
        schedules=_schedules(document),
        schedules_folder=(folder / "schedules").is_dir(),
        command=str(document.get("command") or ""),
        context=_context(document, dense),
    )


def write_page(document: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes `report.html`: what to deploy, the best variants, table, plots, schedules, the command and the context.

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
    path = user_path(folder) / "report.html"
    page = _page(document, path.parent)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
