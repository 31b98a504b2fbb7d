import math
import random
from typing import Any

import pytest

from lightning_prune.errors import DataError
from lightning_prune.report import rows as reading
from lightning_prune.report.rows import AGREEMENT, TOP1

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
def test_the_line_that_a_row_is_on(row: dict[str, Any], name: str) -> None:
    assert reading.series_name(row) == name


def test_lines_and_groups_of_a_comparison() -> None:
    rows = reading.rows_of(comparison())
    lines = reading.series(rows)
    assert list(lines) == ["pomt", "tome", "topk", "evit", "shift", "random", "vwt-intra", "pomt+int8", "int8"]
    assert sum(map(len, lines.values())) == len(rows) - 1
    assert reading.dense_of(rows) is rows[0]
    groups = reading.by_target(rows, TOP1)
    assert list(groups) == [None, 1.1, 1.25, 1.5, 2.0]
    assert [row["variant"] for row in groups[None]] == ["dense", "int8"]
    for target in (1.1, 1.25, 1.5, 2.0):
        shares = [row["top1"] for row in groups[target]]
        assert shares == sorted(shares, reverse=True)


def test_what_ranks_the_rows() -> None:
    document = comparison()
    assert reading.score_of(document["rows"]) == TOP1
    assert reading.score_of(without_accuracy(document)["rows"]) == AGREEMENT
    assert reading.score_of(without_accuracy(document, "agreement")["rows"]) is None


def test_rows_without_the_figure_come_last_as_they_came() -> None:
    rows: list[dict[str, Any]] = [{"top1": None}, {"top1": math.nan}, {"top1": 0.0}, {"top1": 0.5}]
    assert reading.ranked(rows, TOP1) == [rows[3], rows[2], rows[0], rows[1]]
    assert reading.ranked(rows, None) == rows


@pytest.mark.parametrize("value", [None, "", "1", True, math.nan, math.inf])
def test_no_figure(value: Any) -> None:
    assert reading.number({"key": value}, "key") is None


def test_front_is_what_no_other_row_beats() -> None:
    draw = random.Random(0)
    rows = [{"latency_ms": draw.randint(1, 9), "top1": draw.randint(1, 9) / 10} for _ in range(40)]

    def beaten(row: dict[str, Any]) -> bool:
        as_good = [r for r in rows if r["latency_ms"] <= row["latency_ms"] and r["top1"] >= row["top1"]]
        return any(r["latency_ms"] < row["latency_ms"] or r["top1"] > row["top1"] for r in as_good)

    wanted = {(row["latency_ms"], row["top1"]) for row in rows if not beaten(row)}
    front = reading.front_of([*rows, {"latency_ms": None, "top1": 1.0}, {"latency_ms": 0.1, "top1": None}], TOP1)
    assert {(row["latency_ms"], row["top1"]) for row in front} == wanted
    assert len(front) == len(wanted)


def test_the_change_is_computed_where_it_was_not_measured() -> None:
    rows = planned()["rows"]
    assert reading.change_of(rows[1], rows[0]) == pytest.approx(-0.025)
    assert reading.change_of(rows[1], None) is None
    assert reading.change_of({"top1": 0.5, "top1_change": -0.1}, rows[0]) == -0.1


def test_how_figures_are_written() -> None:
    assert reading.percent(0.931451) == "93.15%"
    assert reading.percent(None) == "-"
    assert (reading.points(0.0125), reading.points(-0.0125)) == ("+1.25", "\u22121.25")
