import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

import lightning_prune as lp
from lightning_prune.callbacks.decision import Decision
from lightning_prune.comparison.output import write_comparison
from lightning_prune.report import tables
from lightning_prune.report.rows import Row
from lightning_prune.schedule import MeasurementSource

DENSE = Row(
    variant="dense",
    removed=0,
    tokens=197,
    top1=0.9,
    top5=0.99,
    latency_ms=20.0,
    latency_spread=0.25,
    throughput=800.0,
    throughput_end_to_end=700.0,
    speedup=1.0,
    images=360,
    device="Abacus",
    batch_size=16,
    precision="float32",
)
PRUNED = replace(
    DENSE,
    variant="pomt budget",
    method="pomt",
    block="3",
    removed=56,
    tokens=141,
    top1=0.8875,
    top5=0.995,
    latency_ms=15.5,
    latency_spread=0.126,
    throughput=1030.4,
    throughput_end_to_end=899.6,
    speedup=1.29,
)
DECISION = Decision(
    schedule=lp.Schedule.single(12, 3, 56, made_on=MeasurementSource(device="Abacus")),
    method="pomt",
    dense_tokens=197,
    tokens=141,
    dense_ms=20.0,
    latency_ms=15.5,
    speedup=1.29,
    predicted_ms=None,
    reason="The schedule was given.",
    context={"device": "Abacus", "batch_size": 16},
)


def test_files_of_a_given_schedule(tmp_path: Path) -> None:
    written = write_comparison(tmp_path, [DENSE, PRUNED], {"pomt given": DECISION}, 12.34)
    assert [path.name for path in written] == ["results.csv", "results.json", "schedule.yaml"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    with written[0].open(newline="") as stream:
        reader = csv.DictReader(stream)
        assert reader.fieldnames == list(DENSE.to_dict())
        lines = list(reader)
    assert [line["variant"] for line in lines] == ["dense", "pomt budget"]
    assert float(lines[1]["top1"]) == 0.8875
    document = json.loads(written[1].read_text())
    assert document["rows"] == [DENSE.to_dict(), PRUNED.to_dict()]
    assert document["context"] == {"device": "Abacus", "batch_size": 16}
    assert document["variants"]["pomt given"]["reason"] == "The schedule was given."
    assert document["variants"]["pomt given"]["schedule"]["removed"] == list(DECISION.schedule.removed)
    assert lp.Schedule.load(written[2]).made_on == MeasurementSource(device="Abacus")


def test_schedule_is_that_of_the_last_variant(tmp_path: Path) -> None:
    other = replace(DECISION, schedule=lp.Schedule.single(12, 3, 7))
    write_comparison(tmp_path, [DENSE], {"first": DECISION, "last": other}, 12.34)
    assert lp.Schedule.load(tmp_path / "schedule.yaml").total_removed == 7


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_comparison(tmp_path, [DENSE], {"old": DECISION}, 12.34)
    before = {path: path.read_bytes() for path in old}
    monkeypatch.setattr(tables.csv.DictWriter, "writerows", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_comparison(tmp_path, [DENSE, PRUNED], {"new": DECISION}, 12.34)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
