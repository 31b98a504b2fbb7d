import math
from typing import Any

import pytest

from lightning_prune.report.rows import AGREEMENT, TOP1, Row
from lightning_prune.report.summary import summarise

from .made_up import comparison, planned, pruned, row, without_accuracy


def names(rows: tuple[Row, ...]) -> list[str]:
    return [row.variant for row in rows]


def test_best_of_each_target_and_what_overlaps_with_it() -> None:
    summary = summarise(comparison())
    assert summary.score == TOP1
    assert {target.speedup: names(target.best) for target in summary.targets} == {
        1.1: ["tome 1.1x"],
        1.25: ["tome 1.25x"],
        1.5: ["tome 1.5x"],
        2.0: ["pomt 2x"],
    }
    (fastest,) = [target for target in summary.targets if target.speedup == 2.0]
    assert names(fastest.overlapping) == ["pomt+int8 2x", "evit 2x"]


def test_overlapping_intervals_share_a_point() -> None:
    rows = [
        row("dense"),
        pruned("pomt", 1.5, 0.4, top1_low=-0.006, top1_high=-0.002),
        pruned("tome", 1.5, 0.8, top1_low=-0.010, top1_high=-0.006),
        pruned("topk", 1.5, 0.9, top1_low=-0.011, top1_high=-0.0061),
        pruned("evit", 1.5, 0.9, top1_low=None, top1_high=None),
    ]
    (target,) = summarise({"rows": rows}).targets
    assert names(target.best) == ["pomt 1.5x"]
    assert names(target.overlapping) == ["tome 1.5x"]


def test_equal_scores_are_all_the_best() -> None:
    rows = [row("dense"), pruned("pomt", 1.5, 0.4), pruned("tome", 1.5, 0.4), pruned("topk", 1.5, 0.5)]
    (target,) = summarise({"rows": rows}).targets
    assert names(target.best) == ["pomt 1.5x", "tome 1.5x"]


def test_a_row_that_misses_its_target_is_not_the_best() -> None:
    late = pruned("pomt", 1.5, 0.1, speedup=1.4)
    summary = summarise({"rows": [row("dense"), late, pruned("tome", 1.5, 0.4)]})
    assert names(summary.targets[0].best) == ["tome 1.5x"]
    assert names(summary.missed) == ["pomt 1.5x"]
    alone = summarise({"rows": [row("dense"), late]})
    assert names(alone.targets[0].best) == ["pomt 1.5x"]


def test_variants_that_are_not_faster_by_more_than_the_spread() -> None:
    assert names(summarise(comparison()).not_faster) == ["int8"]
    rows = [
        row("dense"),
        pruned("pomt", 1.5, 0.1),
        pruned("tome", 1.1, 0.2, speedup=1.08, speedup_spread=0.1),
        pruned("topk", 1.1, 0.2, speedup=1.08, speedup_spread=0.07),
    ]
    assert names(summarise({"rows": rows}).not_faster) == ["tome 1.1x"]


def test_variants_below_random_at_the_same_target() -> None:
    pairs = summarise(comparison()).below_random
    assert [(worse.variant, floor.variant) for worse, floor in pairs] == [
        ("vwt-intra 1.5x", "random 1.5x"),
        ("vwt-intra 2x", "random 2x"),
    ]
    assert all(worse.top1 < floor.top1 for worse, floor in pairs if worse.top1 and floor.top1)


def test_targets_of_several_runtimes_are_apart() -> None:
    rows = []
    for runtime, lost in (("torch", 0.2), ("torch.compile", 0.9)):
        own = [row("dense"), pruned("pomt", 1.5, lost), pruned("random", 1.5, 0.5)]
        rows += [each | {"variant": f"{each['variant']} [{runtime}]", "runtime": runtime} for each in own]
    summary = summarise({"rows": rows})
    assert [(target.runtime, names(target.best)) for target in summary.targets] == [
        ("torch", ["pomt 1.5x [torch]"]),
        ("torch.compile", ["random 1.5x [torch.compile]"]),
    ]
    assert [(a.variant, b.variant) for a, b in summary.below_random] == [
        ("pomt 1.5x [torch.compile]", "random 1.5x [torch.compile]")
    ]
    assert summary.not_faster == ()


def test_targets_that_cannot_be_reached() -> None:
    assert summarise(comparison()).unreached == (
        ("tome", 2.0, 1.62, "it merges at most half of the tokens in each of 12 blocks"),
    )
    partial = planned() | {"unreached": [{"method": "tome", "target_speedup": 2.0, "best": None, "reason": None}]}
    assert summarise(partial).unreached == (("tome", 2.0, None, ""),)


def test_schedules_without_targets_have_no_best() -> None:
    summary = summarise(planned())
    assert summary.targets == summary.not_faster == summary.missed == summary.unreached == ()


@pytest.mark.parametrize(("unknown", "score"), [((), AGREEMENT), (("agreement",), None)])
def test_without_accuracy_agreement_is_the_score(unknown: tuple[str, ...], score: object) -> None:
    summary = summarise(without_accuracy(comparison(), *unknown))
    assert summary.score == score
    assert bool(summary.targets) is (score is not None)
    if score is None:
        assert names(summary.not_faster) == ["int8"]


@pytest.mark.parametrize("column", ["top1_change", "top1_low", "top1_high", "top1", "speedup", "speedup_spread"])
@pytest.mark.parametrize("value", [None, math.nan])
def test_summary_works_without_any_one_figure(column: str, value: Any) -> None:
    document = comparison()
    summary = summarise(document | {"rows": [each | {column: value} for each in document["rows"]]})
    assert len(summary.targets) == 4
    known = [row for target in summary.targets for row in target.best if column in ("top1_low", "top1_high")]
    assert all(getattr(row, column) is None for row in known)
