"""A comparison of methods on disk and on the terminal."""

import csv
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lightning_prune as lp
from lightning_prune.comparison.api import MethodComparison
from lightning_prune.comparison.output import check_room, document_of, write_methods
from lightning_prune.comparison.variants import ComparisonPlan, PlannedVariant, UnreachedTarget
from lightning_prune.patching import TokenTrace
from lightning_prune.profiling import LatencyStats
from lightning_prune.report.rows import Row
from lightning_prune.report.tables import comparison_table, remarks
from lightning_prune.schedule import MeasurementSource

WHERE: dict[str, Any] = {"images": 2000, "device": "Abacus", "batch_size": 16, "precision": "float32"}
DENSE = Row(variant="dense", removed=0, tokens=197, top1=0.9725, latency_ms=106.99, latency_spread=2.2, **WHERE)
TIMING = LatencyStats(10.0, 0.5, 0.8, 0.01, 51)


def pruned(method: str, target: float, **more: Any) -> Row:
    figures: dict[str, Any] = {
        "top1": 0.956,
        "top1_change": -0.0165,
        "top1_low": -0.0231,
        "top1_high": -0.0102,
        "agreement": 0.9785,
        "latency_ms": 106.99 / target,
        "latency_spread": 1.1,
        "speedup": target,
        "speedup_spread": 0.02,
    }
    name = f"{method} {target:g}x"
    cut = {"block": "3", "removed": 56, "tokens": 141}
    return Row(
        variant=name, method=method.removesuffix("+int8"), target_speedup=target, **cut, **{**figures, **more}, **WHERE
    )


ROWS = [DENSE, *(pruned(m, t) for m in ("pomt", "vwt-intra+int8", "pomt-nearest") for t in (1.25, 2.0))]


def comparison(rows: list[Row] | None = None) -> MethodComparison:
    planned = [PlannedVariant("dense", "dense", timing=TIMING)]
    for row in (rows or ROWS)[1:]:
        schedule = lp.Schedule.single(12, 3, row.removed or 0, made_on=MeasurementSource(device="Abacus"))
        entry = row.variant.split()[0]
        planned.append(
            PlannedVariant(row.variant, entry, row.method, row.int8, row.target_speedup, {}, schedule, TIMING, row.note)
        )
    unreached = [UnreachedTarget("pomt", 6.0, 1.62, "timed up to 194 removed tokens, the most that it can")]
    context = {"device": "Abacus", "batch_size": 16, "precision": "float32"}
    decided = ComparisonPlan(
        planned, unreached, context, 197, "n/a (no energy counter on this device)", 12.34, "2026-01-02"
    )
    groups = torch.arange(196).expand(2, -1)
    trace = TokenTrace(groups, torch.ones(2, 197, dtype=torch.int64), torch.tensor([197, 197]), (14, 14))
    return MethodComparison(rows or ROWS, decided, torch.rand(2, 1, 56, 56), {"pomt 1.25x": trace})


def printed(rows: list[Row]) -> list[str]:
    out = StringIO()
    Console(file=out, width=80).print(comparison_table(rows))
    return out.getvalue().splitlines()


def test_table_has_a_line_for_each_row_fits_eighty_columns_and_cuts_nothing() -> None:
    lines = printed(ROWS)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert "Abacus, batch 16, float32, 2000 images" in lines[0]
    (dense,) = (line.split() for line in lines if line.split()[:1] == ["dense"])
    assert dense == ["dense", "197", "97.25%", "-", "107.0", "-"]
    (line,) = (line.split() for line in lines if line.split()[:2] == ["vwt-intra+int8", "1.25x"])
    assert line == [*("vwt-intra+int8", "1.25x", "141", "95.60%", "-1.65", "-2.31", "-1.02", "97.9%", "85.59", "1.25x")]


def test_joules_take_a_place_where_they_are_known() -> None:
    lines = printed([replace(row, joules_per_image=0.1234) for row in ROWS])
    assert max(map(len, lines)) <= 80
    assert any("J/im." in line for line in lines)
    assert sum("0.123" in line for line in lines) == len(ROWS)


def test_a_row_without_figures() -> None:
    note = Row(variant="int8", method="int8", int8=True, note="no int8 on abacus", **WHERE)
    (line,) = (line.split() for line in printed([DENSE, note]) if line.split()[:1] == ["int8"])
    assert set(line[1:]) == {"-"}
    document = document_of(comparison([DENSE, note]), "lightning-prune compare")
    assert remarks(document) == [
        "int8: no int8 on abacus",
        "pomt cannot reach 6x: at most 1.62x (timed up to 194 removed tokens, the most that it can)",
        "energy: n/a (no energy counter on this device)",
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    written = write_methods(tmp_path, comparison(), "lightning-prune compare --methods pomt", ([0.5], [0.2]))
    names = ["results.csv", "results.json", "schedule.yaml", "pareto.png", "tokens.png", "report.html"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "schedules", "mine.txt"])
    with written[0].open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == list(DENSE.to_dict())
    assert (lines[0]["top1_low"], lines[1]["top1_low"]) == ("", "-0.0231")
    document = json.loads(written[1].read_text())
    assert list(document) == [*("rows", "context", "seconds", "command", "variants", "unreached", "energy", "started")]
    assert document["rows"] == [row.to_dict() for row in ROWS]
    assert document["command"] == "lightning-prune compare --methods pomt"
    assert document["unreached"][0]["best"] == 1.62
    for row in ROWS[1:]:
        about = document["variants"][row.variant]
        assert about["method"] == row.method
        saved = lp.Schedule.load(tmp_path / about["file"])
        assert saved.to_dict() == about["schedule"]
    assert lp.Schedule.load(tmp_path / "schedule.yaml") == saved
    page = (tmp_path / "report.html").read_text()
    assert "vwt-intra+int8 2x" in page
    assert page.count("data:image/png;base64") == 2


def test_no_picture_where_patches_form_no_grid(tmp_path: Path) -> None:
    found = comparison()
    traces = {name: trace._replace(grid=None) for name, trace in found.traces.items()}
    written = write_methods(tmp_path, found._replace(traces=traces), "")
    assert "tokens.png" not in [path.name for path in written]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_normalisation_of_other_channels_does_not_keep_the_files_from_being_written(tmp_path: Path) -> None:
    written = write_methods(tmp_path, comparison(), "", ([0.5, 0.5, 0.5], [0.2, 0.2, 0.2]))
    assert "tokens.png" in [path.name for path in written]


@pytest.mark.parametrize(("name", "kind"), [("report.html", "file"), ("schedules", "folder"), ("state", "folder")])
def test_what_is_in_the_way_of_the_files_is_told_before_the_work(name: str, kind: str, tmp_path: Path) -> None:
    check_room(tmp_path)
    if kind == "file":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(lp.ArgumentError, match=f"`output` must have room for the {kind} {name}, got a "):
        check_room(tmp_path)
