"""A comparison on disk and on the terminal."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from lightning_prune.report.methods import write_table
from lightning_prune.report.plots import plot_plans, save_figure

if TYPE_CHECKING:
    from lightning_prune.callbacks.decision import Decision
    from lightning_prune.comparison import Row


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
            figure = plans[-1].plot() if hasattr(plans[-1], "front") else plot_plans(plans)
            save_figure(figure, stage / "profile.png")
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
