"""Writing the results of a comparison: tables, documents and pictures."""

import csv
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from lightning_prune._utils.files import atomic_write, slug
from lightning_prune.errors import ArgumentError
from lightning_prune.report.plots import plot

if TYPE_CHECKING:
    from lightning_prune.callbacks.decision import Decision
    from lightning_prune.comparison.api import MethodComparison
    from lightning_prune.comparison.paired_statistics import Row


_FILES = ("results.csv", "results.json", "schedule.yaml", "pareto.png", "tokens.png", "report.html")
Normalisation = tuple[Sequence[float], Sequence[float]]


def document_of(found: "MethodComparison", command: str) -> dict[str, Any]:
    """The comparison as plain values: what `results.json` holds and the report is made of.

    Args:
        found: Rows and what is behind them.
        command: What was typed.
    """
    decided = found.decided
    variants: dict[str, Any] = {}
    for planned in decided.planned:
        about: dict[str, Any] = {"method": planned.method, "settings": dict(planned.settings), "note": planned.note}
        if planned.schedule is not None:
            about |= {"schedule": planned.schedule.to_dict(), "file": f"schedules/{slug(planned.variant)}.yaml"}
        if planned.variant != "dense":
            variants[planned.variant] = about
    return {
        "rows": [row.to_dict() for row in found.rows],
        "context": dict(decided.context),
        "seconds": round(decided.seconds, 1),
        "command": command,
        "variants": variants,
        "unreached": [asdict(unreached) for unreached in decided.unreached],
        "energy": decided.energy,
        "started": decided.started,
    }


def check_room(folder: Path) -> None:
    """Sees to it that nothing is in the way of what `write_methods` writes, before hours of work rather than after.

    Raises:
        ArgumentError: If a folder stands where a file is to be, or the other way about.
    """
    for path in (folder / name for name in _FILES):
        if path.is_dir():
            raise ArgumentError(f"`output` must have room for the file {path.name}, got a folder of that name: {path}")
    for path in (folder / "schedules", folder / "state"):
        if path.exists() and not path.is_dir():
            raise ArgumentError(f"`output` must have room for the folder {path.name}, got a file of that name: {path}")


def write_methods(
    folder: Path, found: "MethodComparison", command: str, normalisation: Normalisation | None = None
) -> list[Path]:
    """Writes results.csv, results.json, schedules, pareto.png, tokens.png and report.html.

    `schedules/<variant>.yaml` can be given to `--prune.schedule`; `schedule.yaml` is the last of them.

    Args:
        folder: Where; exists.
        found: Rows and what is behind them.
        command: What was typed.
        normalisation: Mean and standard deviation of each channel that the pictures were normalised by, if known.

    Returns:
        The files written, without the schedules of the single variants.
    """
    from lightning_prune.report.html_page import write_page
    from lightning_prune.report.token_maps import save_tokens

    document = document_of(found, command)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name:
        stage = Path(name)
        write_table(stage / "results.csv", found.rows)
        (stage / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for planned in found.decided.planned:
            if planned.schedule is not None:
                planned.schedule.save(stage / "schedules" / f"{slug(planned.variant)}.yaml")
                planned.schedule.save(stage / "schedule.yaml")
        plot(document, stage / "pareto.png")
        drawable = {name: trace for name, trace in found.traces.items() if trace.grid is not None}
        if found.pictures is not None and drawable and found.pictures.shape[1] in (1, 3):
            fits = normalisation is not None and {*map(len, normalisation)} <= {1, found.pictures.shape[1]}
            mean, std = normalisation if normalisation is not None and fits else (None, None)
            save_tokens(found.pictures, drawable, stage / "tokens.png", mean, std)
        write_page(document, stage)
        for path in sorted((stage / "schedules").glob("*.yaml")):
            (folder / "schedules").mkdir(exist_ok=True)
            path.replace(folder / "schedules" / path.name)
        return [(stage / name).replace(folder / name) for name in _FILES if (stage / name).exists()]


def write_table(path: Path, rows: "Sequence[Row]") -> Path:
    """Writes rows as CSV; what is not known is empty."""
    table = [row.to_dict() for row in rows]
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return path


def methods_table(rows: "Sequence[Row]") -> Table:
    """The comparison as people read it, a line for each row, within 80 columns.

    Args:
        rows: Dense first.
    """
    first = rows[0]
    title = f"{first.device}, batch {first.batch_size}, {first.precision}, {first.images} images"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("variant", overflow="fold")
    columns: dict[str, Callable[[Row], str]] = {
        "tokens": lambda row: "-" if row.tokens is None else str(row.tokens),
        "top-1 %": lambda row: _percent(row.top1),
        "change": lambda row: _points(row.top1_change),
        "95% interval": _interval,
        "same %": lambda row: _percent(row.agreement, 1),
        "ms": _latency,
        "faster": lambda row: "-" if row.speedup is None else f"{row.speedup:.2f}x",
    }
    if any(row.joules_per_image is not None for row in rows):
        del columns["same %"]
        columns["J/im."] = lambda row: "-" if row.joules_per_image is None else f"{row.joules_per_image:.3g}"
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    last = first.method, first.int8
    for row in rows:
        if (row.method, row.int8) != last:
            table.add_section()
        last = row.method, row.int8
        table.add_row(row.variant, *(cell(row) for cell in columns.values()))
    table.caption = (
        "change: of top-1 against dense, in points, by the same images\n"
        "same: share of images with the best class of dense\n"
        "ms: median latency of a batch; faster: dense latency over this one"
    )
    table.caption_justify = "left"
    return table


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What is to be said below the table: what cannot be run or reached, and where joules come from."""
    notes = [f"{row['variant']}: {row['note']}" for row in document["rows"] if row["note"]]
    unreached = [
        f"{entry['method']} cannot reach {entry['target']:g}x: at most {entry['best']:.2f}x ({entry['reason']})"
        for entry in document["unreached"]
    ]
    return [*notes, *unreached, f"energy: {document['energy']}"]


def _percent(share: float | None, digits: int = 2) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}"


def _points(change: float | None) -> str:
    return "" if change is None else f"{100 * change:+.2f}"


def _interval(row: "Row") -> str:
    if row.top1_low is None or row.top1_high is None:
        return ""
    return f"{100 * row.top1_low:+.2f} {100 * row.top1_high:+.2f}"


def _latency(row: "Row") -> str:
    if row.latency_ms is None:
        return "-"
    digits = 2 if row.latency_ms < 100 else 1 if row.latency_ms < 1000 else 0
    return f"{row.latency_ms:.{digits}f}"


def write_comparison(
    folder: Path, rows: "Sequence[Row]", decisions: "Mapping[str, Decision]", seconds: float
) -> list[Path]:
    """Writes results.csv, results.json, schedule.yaml and, where schedules were planned, profile.json and profile.png.

    `schedule.yaml` is the last variant's, the one to deploy; every variant's is in results.json. Each file appears
    whole, and all or none: they take the place of older ones when the last is written.

    Args:
        folder: Where; exists.
        rows: The table.
        decisions: Variant -> what was decided.
        seconds: What deciding took.

    Returns:
        The files written.
    """
    table = [row.to_dict() for row in rows]
    document = {
        "rows": table,
        "context": dict(next(iter(decisions.values())).context),
        "seconds": round(seconds, 1),
        "variants": {name: _described(decision) for name, decision in decisions.items()},
    }
    *_, last = decisions.values()
    plans = [decision.plan for decision in decisions.values() if decision.plan is not None]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name:
        stage = Path(name)
        write_table(stage / "results.csv", rows)
        (stage / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        last.schedule.save(stage / "schedule.yaml")
        if plans:
            plans[0].profile.save(stage / "profile.json")
            # Of plans over blocks that of the schedule to deploy: their curves are of no token count.
            plot(plans[-1] if hasattr(plans[-1], "front") else plans, stage / "profile.png")
        names = ("results.csv", "results.json", "schedule.yaml", "profile.json", "profile.png")
        return [(stage / name).replace(folder / name) for name in names if (stage / name).exists()]


def results_table(rows: "Sequence[Row]") -> Table:
    """The comparison as people read it, narrow enough for 80 columns: each row has a second line of qualifications."""
    first = rows[0]
    title = f"{first.device}, batch {first.batch_size}, {first.precision}, {first.images} images"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = "below: change against dense in points, spread of the latency, rate of the whole loop (end to end)"
    table.caption_justify = "left"
    table.add_column("variant", no_wrap=True)
    columns: dict[str, Callable[[Row], str]] = {
        "tokens": lambda row: str(row.tokens),
        "R": lambda row: str(row.removed),
        "top-1 %": lambda row: _accuracy(row.top1, first.top1, row is first),
        "top-5 %": lambda row: _accuracy(row.top5, first.top5, row is first),
        "latency ms": lambda row: f"{row.latency_ms:.2f}\n±{row.latency_spread:.2f}",
        "speed-up": lambda row: f"{row.speedup:.2f}x",
        "images/s": lambda row: f"{_rate(row.throughput)}\n({_rate(row.throughput_end_to_end)})",
    }
    if first.top5 is None:
        del columns["top-5 %"]
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.variant, *(cell(row) for cell in columns.values()))
    return table


def _described(decision: "Decision") -> dict[str, Any]:
    if decision.plan is not None:
        return decision.plan.to_dict() | {
            "calibration": decision.calibration,
            "latency_ms": decision.latency_ms,
            "speedup": decision.speedup,
        }
    return {"schedule": decision.schedule.to_dict(), "reason": decision.reason}


def _accuracy(share: float | None, dense: float | None, is_dense: bool) -> str:
    if share is None or dense is None:
        return "-"
    change = "" if is_dense else f"\n{100 * (share - dense):+.2f}"
    return f"{100 * share:.2f}{change}"


def _rate(images_a_second: float | None) -> str:
    return "-" if images_a_second is None else f"{images_a_second:.0f}"
