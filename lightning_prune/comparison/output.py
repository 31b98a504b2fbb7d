"""Writing the results of a comparison: tables, documents and pictures."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune._utils.files import slug
from lightning_prune.errors import ArgumentError
from lightning_prune.report.plots import plot
from lightning_prune.report.rows import Row
from lightning_prune.report.tables import write_table

if TYPE_CHECKING:
    from lightning_prune.callbacks.decision import Decision
    from lightning_prune.comparison.api import MethodComparison

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


def write_comparison(
    folder: Path, rows: Sequence[Row], decisions: "Mapping[str, Decision]", seconds: float
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
            plot(plans[-1], stage / "profile.png")
        names = ("results.csv", "results.json", "schedule.yaml", "profile.json", "profile.png")
        return [(stage / name).replace(folder / name) for name in names if (stage / name).exists()]


def _described(decision: "Decision") -> dict[str, Any]:
    if decision.plan is not None:
        return decision.plan.to_dict() | {
            "calibration": decision.calibration,
            "latency_ms": decision.latency_ms,
            "speedup": decision.speedup,
        }
    return {"schedule": decision.schedule.to_dict(), "reason": decision.reason}
