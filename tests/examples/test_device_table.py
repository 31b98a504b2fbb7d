"""The table of results by device: the committed one, rows of a folder of results, and rows that do not fit."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import lightning_prune as lp
from helpers import ROOT

TABLE = ROOT / "examples" / "results" / "devices.csv"
CONTEXT = {"device": "Abacus 9", "device_type": "cpu", "threads": 4, "image_shape": [3, 32, 32], "torch": "2.14.1+cpu"}
DENSE = {"variant": "dense", "method": "", "runtime": "torch", "precision": "float32", "latency_ms": 20.0}
DENSE |= {"speedup": 1.0, "top1": 0.9, "images": 500, "batch_size": 8, "removed": 0, "int8": False}
PRUNED = {**DENSE, "variant": "auto 2x", "method": "auto", "latency_ms": 10.0, "speedup": 2.0, "speedup_spread": 0.1}
PRUNED |= {"top1": 0.88, "top1_change": -0.02, "top1_low": -0.03, "top1_high": -0.01}
SCHEDULE = {"format": "lightning_prune.schedule", "version": 2, "method": "tome", "removed": [3, 0, 4, 0]}
NOTHING = {**SCHEDULE, "removed": [0, 0, 0, 0]}


@pytest.fixture
def table(program: Any) -> Any:
    return program("device_table")


@pytest.fixture
def schema(program: Any) -> Any:
    return program("device_rows")


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder as `compare` does, with changes."""

    def write(**changes: Any) -> Path:
        int8 = {**PRUNED, "variant": "int8", "method": "int8", "int8": True}
        nothing = {**PRUNED, "variant": "pomt 1.1x", "method": "pomt"}
        unmeasured = {**PRUNED, "variant": "topk 2x", "method": "topk", "latency_ms": None}
        schedules = {"auto 2x": SCHEDULE, "pomt 1.1x": NOTHING, "topk 2x": {**SCHEDULE, "method": "topk"}}
        document = {
            "format": "lightning_prune.comparison",
            "version": 1,
            "rows": [DENSE, PRUNED, int8, nothing, unmeasured],
            "variants": {name: {"method": name, "schedule": each} for name, each in schedules.items()} | {"int8": {}},
            "context": CONTEXT,
            "started": "2026-12-01T10:00:00+00:00",
            "command": f"lightning-prune compare --data.root {Path.home()}/photos",
            "config": {
                "command_line": {
                    "model": {"model": "vit_x", "weights": "mine/x.safetensors", "pretrained": False},
                    "data": {
                        "class_path": "lightning_prune.ImageFolderData",
                        "init_args": {"root": "/a/b", "split": "val"},
                    },
                }
            },
            "versions": {"lightning_prune": "0.1.0", "torch": "2.14.1", "numpy": "2"},
            **changes,
        }
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps(document))
        return folder

    return write


def add(table: Any, path: Path, folder: Path, *words: str) -> int:
    status: int = table.main(["--table", str(path), "add", str(folder), "--contributor", "me", *words])
    return status


def test_the_committed_table_fits_and_has_all_comparisons(table: Any, schema: Any, tmp_path: Path) -> None:
    assert table.main(["check"]) == 0
    rows = schema.read_rows(TABLE)
    assert schema.text_of_rows(rows).encode() == TABLE.read_bytes()
    assert len({row.identity for row in rows}) == len(rows)
    here = {(row.date, row.command) for row in rows}
    for path in (ROOT / "examples" / "results").rglob("results.json"):
        document = json.loads(path.read_text())
        assert (document["started"][:10], document["command"]) in here, path


def test_the_committed_figures_are_those_of_their_files(table: Any, tmp_path: Path) -> None:
    path, folder = tmp_path / "devices.csv", ROOT / "examples" / "results" / "digits_cpu"
    assert table.main(["--table", str(path), "add", str(folder), "--contributor", "lightning-prune"]) == 0
    made = path.read_text().splitlines()
    assert len(made) == 3
    assert set(made) <= set(TABLE.read_text().splitlines())


def test_the_committed_page_is_that_of_the_table(table: Any, tmp_path: Path) -> None:
    page = tmp_path / "devices.md"
    assert table.main(["render", "--page", str(page)]) == 0
    assert page.read_bytes() == (ROOT / "docs" / "devices.md").read_bytes()


def test_a_folder_of_results_is_added_once(table: Any, schema: Any, results: Any, tmp_path: Path) -> None:
    path, folder = tmp_path / "devices.csv", results()
    assert add(table, path, folder) == 0
    rows = schema.read_rows(path)
    assert {row.method for row in rows} == {"tome", "int8"}  # not what removes nothing, nor what was not timed
    row = next(row for row in rows if row.method == "tome")
    assert (row.device, row.threads, row.image_size, row.batch) == ("Abacus 9", 4, "3x32x32", 8)
    assert (row.chosen_by, row.removed, row.removed_in_all) == ("auto", "3 0 4 0", 7)
    assert (row.dense_ms, row.pruned_ms, row.speedup, row.speedup_spread) == (20.0, 10.0, 2.0, 0.1)
    assert (row.metric, row.metric_dense, row.metric_change) == ("top1", 0.9, -0.02)
    assert (row.model, row.weights, row.data) == ("vit_x", "x.safetensors", "ImageFolderData b val")
    assert row.versions == "lightning_prune 0.1.0; torch 2.14.1+cpu"
    assert row.command.endswith("--data.root ~/photos")
    before = path.read_bytes()
    assert add(table, path, folder) == 0
    assert path.read_bytes() == before


def test_a_metric_of_the_module(table: Any, schema: Any, results: Any, tmp_path: Path) -> None:
    logged = {"top1": None, "top1_change": None, "top1_low": None, "top1_high": None, "metric_name": "val/mse"}
    rows = [{**DENSE, **logged, "metric": 4.0}, {**PRUNED, **logged, "metric": 5.0, "metric_change": 1.0}]
    path = tmp_path / "devices.csv"
    assert add(table, path, results(rows=rows)) == 0
    (row,) = schema.read_rows(path)
    assert (row.metric, row.metric_dense, row.metric_change, row.change_low) == ("val/mse", 4.0, 1.0, None)
    page = tmp_path / "page.md"
    assert table.main(["--table", str(path), "render", "--page", str(page)]) == 0
    assert "| auto: tome | 7 | 2.00x ± 0.10 | 4 | +1 | 20.00 | 10.00 | 1 |" in page.read_text()


def test_what_is_not_recorded_must_be_given(
    table: Any, schema: Any, results: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "devices.csv", results(config={})
    assert add(table, path, folder) == 1
    assert "`--model` must be given" in capsys.readouterr().err
    assert not path.exists()
    assert add(table, path, folder, "--model", "net", "--weights", "pretrained", "--data", "ImageNet val") == 0
    assert {row.data for row in schema.read_rows(path)} == {"ImageNet val"}


def test_a_folder_without_results(table: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(table, tmp_path / "devices.csv", tmp_path) == 1
    assert "results.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("threads", "two", ("a whole number", "'two'")),
        ("threads", "0", ("at least 1", "0")),
        ("int8", "yes", ("True or False", "'yes'")),
        ("speedup", "nan", ("a finite number", "'nan'")),
        ("speedup", "2.5", ("2.0000 within", "2.5")),
        ("dense_ms", "-3", ("> 0", "-3.0")),
        ("speedup_spread", "-1", (">= 0", "-1.0")),
        ("method", "tomme", ("tome", "'tomme'")),
        ("method", "topk 3, tomme 6+9", ("tome", "'tomme'")),
        ("runtime", "onyx:threads=1", ("onnxruntime", "'onyx:threads=1'")),
        ("device_type", "gpu", ("cuda", "'gpu'")),
        ("clock", "sun", ("wall", "'sun'")),
        ("removed", "3,4", ("separated by spaces", "'3,4'")),
        ("removed", "0 0", ("some block", "'0 0'")),
        ("image_size", "224", ("3x224x224", "'224'")),
        ("metric_dense", "90", ("share in [0, 1]", "90.0")),
        ("metric_change", "0.05", ("-0.03 to -0.01", "0.05")),
        ("change_low", "", ("change_high", "None")),
        ("versions", "torch 2.14", ("lightning_prune", "'torch 2.14'")),
        ("date", "1.12.2026", ("2026-12-01", "'1.12.2026'")),
        ("command", "python /home/alice/x.py", ("home folder", "'/home/alice/x.py'")),
        ("device", "", ("text", "''")),
        ("data", "a|b", ("Markdown", "'|'")),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    column: str,
    value: str,
    named: tuple[str, str],
    table: Any,
    results: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import csv

    path = tmp_path / "devices.csv"
    add(table, path, results())
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    place = next(index for index, row in enumerate(rows) if row["method"] == "tome")
    rows[place][column] = value
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert table.main(["--table", str(path), "check"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if f"`{column}`" in line or "change_low" in line]
    assert said
    assert f"row {place + 2}, " in said[0]
    assert named[0] in said[0]
    assert named[1] in said[0].partition(", got ")[2]


def test_tables_that_are_none(schema: Any, results: Any, table: Any, tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    add(table, path, results())
    text = path.read_text()
    path.write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(lp.FileFormatError, match="twice"):
        schema.read_rows(path)
    path.write_text(text + "one,two\n")
    with pytest.raises(
        lp.FileFormatError, match=f"row {len(text.splitlines()) + 1}: cells must be {len(schema.COLUMNS)}"
    ):
        schema.read_rows(path)
    path.write_text(text.replace("device,device_type", "device,kind", 1))
    with pytest.raises(lp.FileFormatError, match="columns must be device,device_type"):
        schema.read_rows(path)
    with pytest.raises(lp.FileFormatError, match=r"none\.csv"):
        schema.read_rows(tmp_path / "none.csv")


def test_the_order_of_rows_is_that_of_the_table(schema: Any) -> None:
    rows = schema.read_rows(TABLE)
    assert schema.text_of_rows(rows[::-1]) == schema.text_of_rows(rows)
    assert tuple(field.name for field in fields(schema.DeviceRow)) == schema.COLUMNS
    assert not list(schema.problems_of(replace(rows[0], method="topk 3, tome:schedule=constant 6+9")))
