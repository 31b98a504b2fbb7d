"""Tables: latency profiles and comparisons on the terminal, comparisons as CSV."""

import csv
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from lightning_prune._utils.files import atomic_write
from lightning_prune._utils.formatting import (
    context_line,
    milliseconds,
    model_title,
    percent,
    points,
    speedup,
    timed_quantity,
)
from lightning_prune.profiling import LatencyProfile
from lightning_prune.profiling.interleaved_timer import LEAST_ROUNDS
from lightning_prune.profiling.page_faults import KEPT_MEMORY
from lightning_prune.report.class_table import losing_classes
from lightning_prune.report.rows import OF_CLASSES, OF_GROUPS, TOP1, Row, Score, processes_of, score_of


def profile_table(profile: LatencyProfile) -> Table:
    """A row a token count, dense first; counts just past a cliff stand out."""
    title = f"{model_title(profile.context)} on {context_line(profile.context)}"
    table = Table(title=title, title_justify="left", title_style="bold")
    tail = ["p90"] if profile.p90_ms else []
    for heading in ("tokens", f"{timed_quantity(profile.context)} ms", *tail, "speed-up", "saved a token, us"):
        table.add_column(heading, justify="right")
    cliffs = {cliff.below for cliff in profile.cliffs()}
    above: tuple[int, float] | None = None
    for tokens, latency in sorted(zip(profile.tokens, profile.milliseconds, strict=True), reverse=True):
        saved = f"{1e3 * (above[1] - latency) / (above[0] - tokens):.0f}" if above else ""
        place = profile.tokens.index(tokens)
        several = profile.rounds[place] >= LEAST_ROUNDS  # fewer show no spread
        spread = f" ± {profile.spread[place]:.2f}" if several else ""
        p90 = [f"{profile.p90_ms[place]:.2f}" if several else ""] if tail else []
        style = "bold red" if tokens in cliffs else None
        figures = f"{latency:.2f}{spread}", *p90, speedup(profile.dense_ms / latency)
        table.add_row(str(tokens), *figures, saved, style=style)
        above = (tokens, latency)
    return table


def shape_of(profile: LatencyProfile) -> str:
    """Cliffs and plateaus in a line, and page faults where they matter."""
    cliffs = ", ".join(f"{cliff.above} -> {cliff.below} tokens" for cliff in profile.cliffs()) or "none"
    plateaus = ", ".join(f"{flat.above} to {flat.below} tokens" for flat in profile.plateaus()) or "none"
    simulated = profile.context.get("device_type") == "simulated"
    took = f"Simulated: {profile.seconds:.0f} s there." if simulated else f"Measured in {profile.seconds:.0f} s."
    faults = f" {profile.fault_remark}. {KEPT_MEMORY}" if profile.fault_remark else ""
    return f"Cliffs: {cliffs}. Plateaus: {plateaus}. {took}{faults}"


def runtimes_table(profiles: Sequence[LatencyProfile]) -> Table:
    """What each runtime takes with all tokens, and what fewer tokens bring in it: a row a runtime.

    Args:
        profiles: Of the same model. They were measured one after another, so that their latencies are of different
            moments; their shapes are free of that.
    """
    table = Table(title="runtimes, one after another", title_justify="left", title_style="bold")
    table.add_column("runtime", overflow="fold")
    for heading in ("dense ms", "p90", "at half the tokens", "at a quarter", "cliffs"):
        table.add_column(heading, justify="right")
    for profile in profiles:
        n = profile.dense_tokens
        at = [profile.dense_ms / float(np.interp(n / part, profile.tokens, profile.milliseconds)) for part in (2, 4)]
        name = str(profile.context.get("runtime", "torch"))
        p90 = milliseconds(profile.p90_ms[-1] if profile.p90_ms else None)
        table.add_row(name, f"{profile.dense_ms:.2f}", p90, *map(speedup, at), str(len(profile.cliffs())))
    return table


def write_table(path: Path, rows: Sequence[Row], per_class: bool = False) -> Path:
    """Writes rows as CSV; what is not known is empty.

    Args:
        path: The file.
        rows: Of a comparison.
        per_class: Whether there are columns of the worst class.
    """
    table = [row.to_dict() for row in rows]
    grouped = any(row.worst_group_accuracy is not None for row in rows)
    left_out = {*(() if per_class else OF_CLASSES), *(() if grouped else OF_GROUPS)}
    columns = [name for name in table[0] if name not in left_out]
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return path


def comparison_table(rows: Sequence[Row]) -> Table:
    """The comparison as people read it, a line for each row, within 80 columns.

    Args:
        rows: Dense first.
    """
    first = rows[0]
    context = {"device": first.device, "batch_size": first.batch_size, "precision": first.precision}
    title = f"{context_line(context)}, {first.images} images"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("variant", overflow="fold")
    columns: dict[str, Callable[[Row], str]] = {
        "tokens": lambda row: "-" if row.tokens is None else str(row.tokens),
        **_accuracy_columns(rows),
        "ms": lambda row: milliseconds(row.latency_ms),
        "p90": lambda row: milliseconds(row.latency_p90_ms),
        "faster": lambda row: speedup(row.speedup),
    }
    if any(row.joules_per_image is not None for row in rows):
        columns.pop("same", None)
        columns["J/im."] = lambda row: "-" if row.joules_per_image is None else f"{row.joules_per_image:.3g}"
    if all(row.latency_p90_ms is None for row in rows):
        del columns["p90"]
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    last = first.method, first.int8, first.runtime
    for row in rows:
        if (row.method, row.int8, row.runtime) != last:
            table.add_section()
        last = row.method, row.int8, row.runtime
        table.add_row(row.variant, *(cell(row) for cell in columns.values()))
    table.caption = "\n".join(_caption(rows, columns))
    table.caption_justify = "left"
    return table


def _accuracy_columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """The columns of top-1 or of the metric of the module, and of the agreement, where at least one row has one."""
    score = score_of(rows)
    if score is not None and score.key == "metric":
        own: dict[str, tuple[str, Callable[[Row], str]]] = {
            "metric": ("metric", lambda row: score.text(row.metric)),
            "change": (
                "metric_change",
                lambda row: "" if row.metric_change is None else score.change_text(row.metric_change),
            ),
            "95% interval": ("metric_low", lambda row: _metric_interval(row, score)),
        }
    else:
        own = {
            "top-1": ("top1", lambda row: percent(row.top1)),
            "change": ("top1_change", lambda row: _change(row.top1_change, TOP1)),
            "95% interval": ("top1_low", _interval),
        }
    own["same"] = "agreement", lambda row: percent(row.agreement, 1)
    own["worst"] = "worst_group_accuracy", lambda row: percent(row.worst_group_accuracy, 1)
    known = {heading: cell for heading, cell in own.items() if any(getattr(row, cell[0]) is not None for row in rows)}
    return {heading: cell for heading, (_, cell) in known.items()}


def _change(change: float | None, score: Score) -> str:
    return "" if change is None else score.change_text(change)


def _caption(rows: Sequence[Row], columns: Collection[str]) -> list[str]:
    """What the headings of the columns that are there mean."""
    score = score_of(rows)
    if score is None:
        lines = ["accuracy: not known"]
    elif score.key == "metric":
        better = ", better the lower it is" if score.lower_is_better else ""
        lines = [f"metric: {score.label}{better}" + ("; change: against dense" if "change" in columns else "")]
    else:
        lines = ["change: of top-1 against dense, in points, by the same images"] if "change" in columns else []
    if "same" in columns:
        lines.append("same: share of images with the best class of dense")
    if "worst" in columns:
        lines.append("worst: accuracy of the worst group of images")
    tail = ", p90: 90th percentile" if "p90" in columns else ""
    return [*lines, f"ms: median latency of a batch{tail}; faster: dense latency over this one"]


def remarks(document: Mapping[str, Any]) -> list[str]:
    """Lines below the table: what cannot be run or reached, why each schedule was chosen, and where joules come from.

    Args:
        document: What `compare` writes as `results.json`.
    """
    variants, best = document.get("variants") or {}, document.get("best")
    notes = [f"{row['variant']}: {row['note']}" for row in document["rows"] if row["note"]]
    reasons = [f"{name}: {variant['reason']}" for name, variant in variants.items() if variant.get("reason")]
    unreached = [
        f"{entry['method']} cannot reach {entry['target_speedup']:g}x: "
        f"at most {speedup(entry['best'])} ({entry['reason']})"
        for entry in document["unreached"]
    ]
    classes = [
        f"classes that lose most by {found.variant}: {', '.join(e.sentence for e in found.losing) or found.sentence}"
        for found in losing_classes(document)
    ]
    chosen = [f"schedule.yaml is that of {best['variant']}. {best['reason']}"] if best else []
    is_cpu_time = timed_quantity(document.get("context") or {}) != "latency"
    clock = ["ms: CPU time of the process, not wall time"] if is_cpu_time else []
    processes = processes_of(document)
    shared = [f"ms: of one process; the images were shared by {processes} processes"] if processes > 1 else []
    return [*clock, *shared, *notes, *reasons, *unreached, *classes, f"energy: {document['energy']}", *chosen]


def _metric_interval(row: Row, score: Score) -> str:
    if row.metric_low is None or row.metric_high is None:
        return ""
    return f"{score.change_text(row.metric_low)} {score.change_text(row.metric_high)}"


def _interval(row: Row) -> str:
    if row.top1_low is None or row.top1_high is None:
        return ""
    return f"{points(row.top1_low)} {points(row.top1_high)}"
