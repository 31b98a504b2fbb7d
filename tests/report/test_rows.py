import math
import random
from typing import Any

import pytest

from lightning_prune.errors import DataError
from lightning_prune.report import rows as reading
from lightning_prune.report.rows import AGREEMENT, TOP1, Row

from .made_up import comparison, planned, without_accuracy


@pytest.mark.parametrize("document", [{}, {"rows": []}, {"rows": None}, {"rows": "dense"}, {"rows": [1]}])
def test_a_document_without_rows_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="must hold the rows of a comparison under 'rows', got"):
        reading.rows_of(document)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"method": "", "int8": False}, ""),
        ({"method": None}, ""),
        ({"method": "dense"}, ""),
        ({"method": "", "int8": True}, "int8"),
        ({"method": "int8"}, "int8"),
        ({"method": "pomt", "int8": False}, "pomt"),
        ({"method": "pomt", "int8": True}, "pomt+int8"),
        ({"method": "pomt+int8", "int8": True}, "pomt+int8"),
    ],
)
def test_series_name_is_the_method_and_int8(row: dict[str, Any], name: str) -> None:
    assert reading.series_name(Row.from_dict(row)) == name


def test_lines_and_groups_of_a_comparison() -> None:
    rows = reading.rows_of(comparison())
    lines = reading.series(rows)
    assert list(lines) == ["pomt", "tome", "topk", "evit", "shift", "random", "vwt-intra", "pomt+int8", "int8"]
    assert sum(map(len, lines.values())) == len(rows) - 1
    assert reading.dense_of(rows) is rows[0]
    groups = reading.by_target(rows, TOP1)
    assert list(groups) == [None, 1.1, 1.25, 1.5, 2.0]
    assert [row.variant for row in groups[None]] == ["dense", "int8"]
    for target in (1.1, 1.25, 1.5, 2.0):
        shares = [row.top1 or 0.0 for row in groups[target]]
        assert shares == sorted(shares, reverse=True)


def test_score_is_top1_if_known_and_else_agreement() -> None:
    document = comparison()
    assert reading.score_of(reading.rows_of(document)) == TOP1
    assert reading.score_of(reading.rows_of(without_accuracy(document))) == AGREEMENT
    assert reading.score_of(reading.rows_of(without_accuracy(document, "agreement"))) is None


def test_a_metric_of_the_module_ranks_where_there_is_no_top1() -> None:
    rows = [Row(variant=str(value), metric=value, metric_name="val/loss", latency_ms=value) for value in (3, 1, 2)]
    score = reading.score_of(rows)
    assert score is not None
    assert (score.key, score.label, score.lower_is_better) == ("metric", "val/loss", True)
    assert [row.variant for row in reading.ranked([Row(variant="unknown"), *rows], score)] == ["1", "2", "3", "unknown"]
    assert [row.variant for row in reading.front_of(rows, score)] == ["1"]
    upwards = reading.metric_score("val/f1")
    assert [row.variant for row in reading.front_of(rows, upwards)] == ["1", "2", "3"]
    assert reading.score_of([Row(metric=0.5, metric_name="val/f1", agreement=0.9)]) == upwards


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        *(("val/loss", True), ("val_loss", True), ("valLoss", True), ("val/rmse", True), ("word_error_rate", True)),
        *(("val/acc", False), ("glossary_f1", False), ("val/mAP", False), ("metric", False)),
    ],
)
def test_metrics_that_are_better_the_lower_they_are(name: str, lower: bool) -> None:
    assert reading.metric_score(name).lower_is_better is lower


def test_lines_of_several_runtimes() -> None:
    def row(variant: str, method: str, runtime: str) -> Row:
        return Row(variant=f"{variant} [{runtime}]", method=method, runtime=runtime)

    rows = [row("dense", "", "torch"), row("tome 2x", "tome", "torch")]
    rows += [row("dense", "", "torch.compile"), row("tome 2x", "tome", "torch.compile")]
    assert list(reading.series(rows)) == ["tome [torch]", "dense [torch.compile]", "tome [torch.compile]"]
    assert [reading.dense_of(rows, each) for each in rows] == [rows[0], rows[0], rows[2], rows[2]]
    assert reading.dense_of(rows) is rows[0]


def test_rows_without_the_figure_come_last_as_they_came() -> None:
    rows = [Row(variant=str(share), top1=share) for share in (None, math.nan, 0.0, 0.5)]
    assert reading.ranked(rows, TOP1) == [rows[3], rows[2], rows[0], rows[1]]
    assert reading.ranked(rows, None) == rows


@pytest.mark.parametrize("value", [None, "", "1", True, math.nan, math.inf])
def test_value_that_is_no_number_is_none(value: Any) -> None:
    assert reading.number(value) is None
    read = Row.from_dict({"variant": "pomt", "top1": value, "removed": value})
    assert (read.top1, read.removed) == (None, None)
    assert TOP1.of(Row(top1=value)) is None


def test_a_row_is_read_as_it_was_written() -> None:
    row = Row(variant="pomt 1.5x", method="pomt", top1=0.5, int8=True, removed=3, images=8, note="slow")
    assert Row.from_dict(row.to_dict()) == row
    assert Row.from_dict({"variant": "dense", "method": None, "unknown": 3}) == Row(variant="dense")


def test_front_holds_the_rows_that_no_other_beats() -> None:
    draw = random.Random(0)
    points = [(draw.randint(1, 9), draw.randint(1, 9) / 10) for _ in range(40)]
    rows = [Row(latency_ms=latency, top1=share) for latency, share in points]

    def beaten(latency: float, share: float) -> bool:
        as_good = [(ms, top1) for ms, top1 in points if ms <= latency and top1 >= share]
        return any(ms < latency or top1 > share for ms, top1 in as_good)

    wanted = {point for point in points if not beaten(*point)}
    front = reading.front_of([*rows, Row(top1=1.0), Row(latency_ms=0.1)], TOP1)
    assert {(row.latency_ms, row.top1) for row in front} == wanted
    assert len(front) == len(wanted)


def test_the_change_is_computed_where_it_was_not_measured() -> None:
    rows = reading.rows_of(planned())
    assert reading.change_of(rows[1], rows[0]) == pytest.approx(-0.025)
    assert reading.change_of(rows[1], None) is None
    assert reading.change_of(Row(top1=0.5, top1_change=-0.1), rows[0]) == -0.1
