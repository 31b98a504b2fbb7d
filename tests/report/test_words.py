import re
from typing import Any

import pytest

from lightning_prune.report.html_page import summary

from .made_up import comparison, planned, pruned, row, without_accuracy


def said(document: dict[str, Any]) -> str:
    found = summary(document)
    return "\n".join([*found.findings, *found.cautions])


def test_who_won_where_and_by_how_much() -> None:
    found = summary(comparison())
    assert found.findings[0] == (
        "Of 4 speed-up targets, the most accuracy is kept by tome at 3 (1.1x, 1.25x, 1.5x) and pomt at 1 (2x)."
    )
    fastest = found.findings[4]
    assert fastest.startswith("At 2x pomt kept the most: 88.80% top-1, \u22124.30 points against dense (95% interval")
    assert "bear out" not in fastest
    assert "Too close to call, for their intervals overlap with its: pomt+int8 (88.50%) and evit (87.10%)." in fastest
    assert "topk" not in fastest


def test_an_interval_that_holds_zero_is_no_difference() -> None:
    assert ": no difference that 95% would bear out." in summary(comparison()).findings[1]


def test_what_speaks_against_a_method_is_said() -> None:
    cautions = summary(comparison()).cautions
    assert "int8 does not help here: it is 0.90x as fast as dense." in cautions
    assert cautions[1].startswith("pomt is not the best everywhere: place 2 of 8 at 1.1x, 0.15 points behind tome;")
    assert "at 2x" not in cautions[1]
    assert cautions[2] == (
        "Removing tokens at random does better than vwt-intra at 1.5x (84.90% against 85.70%) and vwt-intra at 2x "
        "(73.40% against 78.30%)."
    )
    assert cautions[3] == (
        "tome cannot reach 2x: at most 1.62x (it merges at most half of the tokens in each of 12 blocks)."
    )


def test_a_tie_has_two_winners() -> None:
    rows = [row("dense"), pruned("pomt", 1.5, 0.4), pruned("tome", 1.5, 0.4)]
    assert "At 1.5x pomt and tome kept the most: 92.70%" in said({"rows": rows})
    assert "not the best" not in said({"rows": rows})


def test_a_row_that_missed_its_target_wins_nothing() -> None:
    late = pruned("pomt", 1.5, 0.1, speedup=1.4)
    text = said({"rows": [row("dense"), late, pruned("tome", 1.5, 0.4)]})
    assert "At 1.5x tome kept the most" in text
    assert "Targets that the final timing did not bear out: pomt 1.5x (1.40x)." in text


def test_nothing_gained_is_said_once() -> None:
    slow = {"speedup": 1.01, "speedup_spread": 0.02}
    rows = [row("dense"), pruned("pomt", 1.1, 0.1, **slow), pruned("tome", 1.1, 0.2, **slow)]
    cautions = summary({"rows": rows}).cautions
    assert cautions[0].startswith("No variant is faster than dense by more than the spread of the timing")
    assert not [sentence for sentence in cautions if "does not help here" in sentence]


def test_what_is_faster_by_less_than_the_spread_is_not_called_slow() -> None:
    rows = [row("dense"), pruned("pomt", 1.5, 0.1), pruned("tome", 1.1, 0.2, speedup=1.08, speedup_spread=0.1)]
    assert "tome 1.1x may not help here: it is 1.08x as fast as dense, with a spread of 0.10." in said({"rows": rows})


def test_planned_schedules_are_told_one_by_one() -> None:
    assert summary(planned()).findings == [
        "pomt utility: 2.36x as fast as dense, 90.60% top-1, \u22122.50 points against dense.",
        "pomt budget: 2.14x as fast as dense, 92.80% top-1, \u22120.30 points against dense.",
    ]
    assert summary(planned()).cautions == []


def test_without_accuracy_agreement_ranks_and_the_page_says_so() -> None:
    found = summary(without_accuracy(comparison()))
    assert "the most agreement with dense is kept by tome" in found.findings[0]
    assert "logs no val/top1. Variants are ranked by agreement with dense." in found.cautions[0]


def test_with_neither_only_speed_is_told() -> None:
    found = summary(without_accuracy(comparison(), "agreement"))
    assert found.findings == ["int8: 0.90x as fast as dense."]
    assert "logs no val/top1. The speed-ups below say nothing of its price." in found.cautions[0]


@pytest.mark.parametrize(
    ("column", "figure"),
    [
        ("top1_change", "2x pomt kept the most: 88.80% top-1, \u22124.30"),
        ("top1_low", "\u22125.25"),
        ("top1_high", "\u22123.35"),
        ("top1", "88.80%"),
        ("speedup", "0.90x"),
        ("speedup_spread", None),  # no sentence about this comparison needs it
    ],
)
def test_any_figure_may_be_missing(column: str, figure: str | None) -> None:
    """What rests on it is left out, and what does not, for instance the target that is out of reach, stays."""
    document = comparison()
    texts = [
        said(document | {"rows": [each | {column: missing} for each in document["rows"]]})
        for missing in (None, float("nan"))
    ]
    assert texts[0] == texts[1]
    assert not re.search(r"\b(nan|None)\b", texts[0])
    assert "1.62x" in texts[0]
    if figure is None:
        assert texts[0] == said(document)
    else:
        assert figure in said(document)
        assert figure not in texts[0]


def test_what_could_not_be_reached_may_be_told_in_part() -> None:
    document = planned() | {"unreached": [{"method": "tome", "target_speedup": 2.0, "best": None, "reason": None}]}
    assert summary(document).cautions == ["tome cannot reach 2x."]
