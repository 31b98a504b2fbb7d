"""The results of a comparison: what is written, and which variant is the best."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.comparison import Comparison, read_results
from lightning_prune.comparison.best_variant import BestVariant, choose_best
from lightning_prune.comparison.comparison_results import check_output_paths, normalisation_of
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant, UnreachedTarget
from lightning_prune.patching import TokenTrace
from lightning_prune.planning import Objective
from lightning_prune.profiling import LatencyProfile, LatencyStats
from lightning_prune.report import tables
from lightning_prune.report.rows import OF_CLASSES, OF_GROUPS, Row

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


PROFILE = LatencyProfile(
    tokens=(1, 99, 197),
    milliseconds=(2.0, 5.0, 10.0),
    spread=(0.1, 0.1, 0.1),
    rounds=(3, 3, 3),
    method="random",
    block=0,
    depth=12,
    context={"device": "Abacus", "model": "ViT", "batch_size": 16, "precision": "float32"},
)


def comparison(rows: list[Row] | None = None, **more: Any) -> Comparison:
    planned = [PlannedVariant("dense", "dense", timing=TIMING)]
    for row in (rows or ROWS)[1:]:
        schedule = lp.Schedule.single(12, 3, row.removed or 0, made_on=MeasurementSource(device="Abacus"))
        planned.append(
            PlannedVariant(
                variant=row.variant,
                request=row.variant.split()[0],
                method=row.method,
                int8=row.int8,
                target_speedup=row.target_speedup,
                schedule=schedule,
                timing=TIMING,
                note=row.note,
            )
        )
    unreached = [UnreachedTarget("pomt", 6.0, 1.62, "timed up to 194 removed tokens, the most that it can")]
    context = {"device": "Abacus", "batch_size": 16, "precision": "float32"}
    energy = "n/a (no energy counter on this device)"
    plan = ComparisonPlan(planned, unreached, context, 197, energy, 12.34, "2026-01-02", profile=PROFILE)
    groups = torch.arange(196).expand(2, -1)
    trace = TokenTrace(groups, torch.ones(2, 197, dtype=torch.int64), torch.tensor([197, 197]), (14, 14))
    shared: dict[str, Any] = {"pictures": torch.rand(2, 1, 56, 56), "traces": {"pomt 1.25x": trace}}
    return Comparison(tuple(rows or ROWS), plan, **{**shared, **more})


@pytest.mark.usefixtures("drawn")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    best = BestVariant("pomt 2x", "It is the fastest.", True)
    command = "lightning-prune compare --methods pomt"
    found = comparison(best=best, command=command, config={"seed": 0}, normalisation=([0.5], [0.2]))
    written = found.save(tmp_path)
    names = ["results.csv", "results.json", "schedule.yaml", "profile.json", "profile.png"]
    names += ["pareto.png", "tokens.png", "report.html"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "schedules", "mine.txt"])
    with written[0].open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == [name for name in DENSE.to_dict() if name not in {*OF_CLASSES, *OF_GROUPS}]
    assert (lines[0]["top1_low"], lines[1]["top1_low"]) == ("", "-0.0231")
    document = read_results(written[1])
    assert document == found.to_dict()
    assert document["rows"] == [row.to_dict() for row in ROWS]
    assert (document["command"], document["config"]) == (command, {"seed": 0})
    assert document["versions"]["lightning_prune"] == lp.__version__
    assert {"python", "torch", "lightning"} <= document["versions"].keys()
    assert document["unreached"][0]["best"] == 1.62
    for row in ROWS[1:]:
        about = document["variants"][row.variant]
        assert about["method"] == row.method
        saved = lp.Schedule.load(tmp_path / about["file"])
        assert saved.to_dict() == about["schedule"]
    chosen = lp.Schedule.load(tmp_path / "schedule.yaml")
    assert chosen == lp.Schedule.single(12, 3, 56)
    assert "reason: It is the fastest." in (tmp_path / "schedule.yaml").read_text()
    assert LatencyProfile.load(tmp_path / "profile.json") == PROFILE
    page = (tmp_path / "report.html").read_text()
    assert "vwt-intra+int8 2x" in page


def test_no_schedule_where_no_objective_was_stated(tmp_path: Path) -> None:
    comparison(best=BestVariant("pomt 2x", "It is the fastest.", True)).save(tmp_path)
    assert "schedule.yaml" not in [path.name for path in comparison().save(tmp_path)]
    assert not (tmp_path / "schedule.yaml").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_of_an_earlier_comparison_stays_beside_the_new_figures(tmp_path: Path) -> None:
    comparison(best=BestVariant("pomt 2x", "It is the fastest.", True)).save(tmp_path)
    (tmp_path / "schedules" / "mine.yaml").write_text("kept")
    found = comparison([DENSE, pruned("tome", 1.5)], traces={})
    names = [path.name for path in replace(found, plan=replace(found.plan, profile=None)).save(tmp_path)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "schedules"])
    assert {"schedule.yaml", "profile.json", "profile.png", "tokens.png"}.isdisjoint(names)
    assert sorted(path.name for path in (tmp_path / "schedules").iterdir()) == ["mine.yaml", "tome-1.5x.yaml"]


@pytest.mark.parametrize(("values", "stays"), [({"version": 99}, False), ({"format": "mine"}, True)])
def test_files_of_another_release_go_and_those_of_other_programs_stay(
    values: dict[str, Any], stays: bool, tmp_path: Path
) -> None:
    comparison(best=BestVariant("pomt 2x", "It is the fastest.", True)).save(tmp_path)
    document = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(document | values))
    comparison(traces={}).save(tmp_path)
    for path in (tmp_path / "schedule.yaml", tmp_path / "tokens.png"):
        assert path.exists() == stays


def test_the_schedule_of_dense_removes_nothing(tmp_path: Path) -> None:
    comparison(best=BestVariant("dense", "Nothing is gained.", True)).save(tmp_path)
    schedule = lp.Schedule.load(tmp_path / "schedule.yaml")
    assert (schedule.depth, schedule.total_removed) == (12, 0)


def test_no_picture_where_patches_form_no_grid(tmp_path: Path) -> None:
    found = comparison()
    traces = {name: trace._replace(grid=None) for name, trace in found.traces.items()}
    assert "tokens.png" not in [path.name for path in replace(found, traces=traces).save(tmp_path)]


@pytest.mark.usefixtures("drawn")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_normalisation_of_other_channels_does_not_keep_the_files_from_being_written(tmp_path: Path) -> None:
    written = comparison(normalisation=([0.5, 0.5, 0.5], [0.2, 0.2, 0.2])).save(tmp_path)
    assert "tokens.png" in [path.name for path in written]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_that_fails_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison().save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(tables.csv.DictWriter, "writerows", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        comparison([DENSE, pruned("pomt", 1.5)]).save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": []}, "it has no format entry"),
        ({"format": "lightning_prune.comparison", "version": 9}, "of version 9; this release reads version 1"),
        ({"format": "lightning_prune.schedule", "version": 1}, "it has format 'lightning_prune.schedule'"),
    ],
)
def test_results_of_another_release_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(values))
    with pytest.raises(lp.FileFormatError, match=message):
        read_results(path)


@pytest.mark.parametrize(("name", "kind"), [("report.html", "file"), ("schedules", "folder"), ("state", "folder")])
def test_what_is_in_the_place_of_a_file_is_refused_before_the_work(name: str, kind: str, tmp_path: Path) -> None:
    check_output_paths(tmp_path)
    if kind == "file":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(lp.ArgumentError, match=f"`output` must have room for the {kind} {name}, got a "):
        check_output_paths(tmp_path)


def best_of(objective: Objective, *figures: tuple[float | None, float | None, float | None]) -> BestVariant:
    """Of dense with 90% at 10 ms and variants with a top-1, the upper end of its interval, and a speed-up."""
    rows = [Row(variant="dense", top1=0.9, latency_ms=10.0, speedup=1.0)]
    for number, (top1, high, speedup) in enumerate(figures):
        ms = 10.0 / speedup if speedup else None
        rows.append(Row(variant=str(number), top1=top1, top1_high=high, latency_ms=ms, speedup=speedup))
    planned = [PlannedVariant("dense", "dense")]
    planned += [PlannedVariant(row.variant, row.variant, schedule=lp.Schedule([1, 0])) for row in rows[1:]]
    return choose_best(rows, planned, objective)


BUDGET = lp.AccuracyBudget(0.01)  # 89.1% of 90%


@pytest.mark.parametrize(
    ("objective", "figures", "variant", "met"),
    [
        (BUDGET, [(0.895, None, 1.2), (0.892, None, 1.5), (0.8, None, 3.0)], "1", True),
        (BUDGET, [(0.892, None, 1.2), (0.89, 0.02, 2.0)], "0", True),  # one that meets it goes before one that may
        (BUDGET, [(0.88, 0.02, 1.2), (0.87, 0.03, 2.0), (0.8, -0.05, 3.0)], "1", True),
        (BUDGET, [(0.88, -0.012, 1.2)], "dense", True),
        (BUDGET, [(None, None, 2.0), (float("nan"), None, 3.0), (0.9, None, None)], "dense", True),
        (lp.LatencyBudget(speedup=1.5), [(0.85, 0.0, 1.5), (0.88, 0.0, 1.51), (0.9, 0.0, 1.4)], "1", True),
        (lp.LatencyBudget(ms=5.0), [(0.7, 0.0, 2.1), (0.9, 0.0, 1.4)], "0", True),
        (lp.LatencyBudget(speedup=4.0), [(0.7, 0.0, 2.1), (0.9, 0.0, 1.4)], "0", False),
        (lp.Utility(0.5), [(0.8, 0.0, 2.0), (0.3, 0.0, 2.1)], "0", True),
        (lp.Utility(0.0), [(0.8, 0.0, 2.0), (0.3, 0.0, 2.1)], "dense", True),
        (BUDGET, [], "dense", True),
    ],
)
def test_the_best_by_an_objective(objective: Objective, figures: Any, variant: str, met: bool) -> None:
    best = best_of(objective, *figures)
    assert (best.variant, best.met) == (variant, met)
    assert str(objective) in best.reason


def test_variants_that_were_not_measured_are_not_among_those_that_one_is_the_best_of() -> None:
    assert best_of(BUDGET, (0.895, None, 1.2), (None, None, None)).reason.startswith("The best of 2 variants by")


@pytest.mark.parametrize(("confidence", "best"), [(0.5, "far"), (0.95, "near"), (0.9999, "dense")])
def test_with_a_confidence_the_lower_bound_of_the_change_has_to_meet_the_budget(confidence: float, best: str) -> None:
    """Standard errors of 0.4% and 0.1% of the images: 1.645 of them are taken off for 95%."""
    rows = [Row(variant="dense", top1=0.9, latency_ms=10.0, speedup=1.0)]
    for name, change, stderr, speedup in (("far", -0.008, 0.004, 2.0), ("near", -0.006, 0.001, 1.5)):
        low, high = change - 1.96 * stderr, change + 1.96 * stderr
        top1 = {"top1": 0.9 + change, "top1_change": change, "top1_low": low, "top1_high": high}
        rows.append(Row(variant=name, method="tome", latency_ms=10 / speedup, speedup=speedup, **top1))
    planned = [PlannedVariant(row.variant, row.method or "dense", schedule=lp.Schedule([1, 0])) for row in rows]
    assert choose_best(rows, planned, lp.AccuracyBudget(0.01, confidence)).variant == best


def test_a_budget_on_the_tail_is_judged_by_the_90th_percentile() -> None:
    rows = [Row(variant="dense", top1=0.9, latency_ms=10.0, latency_p90_ms=11.0, speedup=1.0)]
    rows += [
        Row(variant="steady", method="tome", top1=0.8, latency_ms=7.0, latency_p90_ms=7.5, speedup=1.4),
        Row(variant="uneven", method="pomt", top1=0.85, latency_ms=6.0, latency_p90_ms=9.0, speedup=1.6),
    ]
    planned = [PlannedVariant(row.variant, row.method or "dense", schedule=lp.Schedule([1, 0])) for row in rows]
    assert choose_best(rows, planned, lp.LatencyBudget(ms=8)).variant == "uneven"
    assert choose_best(rows, planned, lp.LatencyBudget(ms=8, percentile=90)).variant == "steady"


def test_without_top1_the_agreement_with_dense_counts() -> None:
    rows = [Row(variant="dense", latency_ms=10.0, speedup=1.0)]
    rows += [Row(variant=str(a), agreement=a, speedup=1 / a, latency_ms=10 * a) for a in (0.9, 0.995, 0.98)]
    planned = [PlannedVariant(row.variant, row.variant, schedule=lp.Schedule([1, 0])) for row in rows]
    best = choose_best(rows, planned, lp.AccuracyBudget(0.03))
    assert best.variant == "0.98"
    assert "98.00% agreement with dense" in best.reason


@pytest.mark.parametrize(
    ("name", "dense", "figures", "best"),
    [
        ("val/accuracy", 0.8, {"a": (0.79, 1.2), "b": (0.7, 2.0)}, "a"),
        ("val/loss", 1.0, {"a": (1.01, 1.2), "b": (1.2, 2.0)}, "a"),  # lower is better
        ("val/loss", 1.0, {"a": (1.01, 1.2), "b": (0.9, 2.0)}, "b"),
        ("val/r2", -0.1, {"a": (-0.1, 1.2), "b": (-0.2, 2.0)}, "b"),  # no shares of it: agreement with dense counts
    ],
)
def test_without_top1_the_metric_of_the_module_counts(
    name: str, dense: float, figures: dict[str, tuple[float, float]], best: str
) -> None:
    rows = [Row(variant="dense", latency_ms=10.0, speedup=1.0, metric=dense, metric_name=name)]
    rows += [
        Row(variant=key, method="pomt", metric=value, metric_name=name, agreement=0.99, speedup=s, latency_ms=10 / s)
        for key, (value, s) in figures.items()
    ]
    planned = [PlannedVariant(row.variant, row.variant, row.method, schedule=lp.Schedule([1, 0])) for row in rows]
    assert choose_best(rows, planned, lp.AccuracyBudget(0.02)).variant == best


def test_the_best_of_several_runtimes_is_the_fastest_there_is() -> None:
    """A budget's speed-up is over dense in the first runtime, and compiling alone may reach it."""

    def row(variant: str, method: str, runtime: str, ms: float, top1: float) -> Row:
        return Row(
            variant=f"{variant} [{runtime}]", method=method, runtime=runtime, latency_ms=ms, top1=top1, speedup=1.0
        )

    rows = [row("dense", "", "torch", 10.0, 0.9), row("tome 2x", "tome", "torch", 5.0, 0.85)]
    rows += [row("dense", "", "torch.compile", 6.0, 0.9), row("tome 2x", "tome", "torch.compile", 3.0, 0.85)]
    planned = [
        PlannedVariant(r.variant, r.variant, r.method, schedule=lp.Schedule([1, 0]) if r.method else None) for r in rows
    ]
    best = choose_best(rows, planned, lp.LatencyBudget(speedup=1.5))
    assert best.variant == "dense [torch.compile]"
    assert "1.67x" in best.reason
    assert choose_best(rows, planned, lp.LatencyBudget(speedup=3.0)).variant == "tome 2x [torch.compile]"


@pytest.mark.parametrize(("runtime", "best"), [("torch", "dense"), ("onnxruntime", "pomt+int8 2x")])
def test_8_bits_are_deployable_where_the_runtime_quantizes(runtime: str, best: str) -> None:
    rows = [Row(variant="dense", top1=0.9, latency_ms=10.0, speedup=1.0)]
    rows.append(Row(variant="pomt+int8 2x", method="pomt", top1=0.9, int8=True, latency_ms=5.0, speedup=2.0))
    dense = PlannedVariant("dense", "dense", runtime=runtime)
    cut = lp.Schedule([1, 0])
    pruned = PlannedVariant("pomt+int8 2x", "pomt+int8", "pomt", int8=True, schedule=cut, runtime=runtime)
    found = choose_best(rows, [dense, pruned], BUDGET)
    assert found.variant == best
    assert ("onnxruntime:quantize=static" in found.reason) == (best != "dense")


def test_8_bits_alone_can_be_the_best(tmp_path: Path) -> None:
    dense, int8 = DENSE, replace(DENSE, variant="int8", method="int8", int8=True, latency_ms=5.0, speedup=2.0)
    planned = [PlannedVariant("dense", "dense", runtime="onnxruntime")]
    planned.append(PlannedVariant("int8", "int8", "int8", int8=True, runtime="onnxruntime"))
    best = choose_best([dense, int8], planned, BUDGET)
    assert best.variant == "int8"
    whole = comparison(best=best)
    profiled = replace(whole.plan, planned=planned)
    replace(whole, rows=(dense, int8), plan=profiled, traces={}).save(tmp_path)
    schedule = lp.Schedule.load(tmp_path / "schedule.yaml")
    assert (schedule.total_removed, schedule.made_on.runtime) == (0, "onnxruntime:quantize=static")


class Configured:
    def __init__(self, config: Any) -> None:
        self.data_config = config


@pytest.mark.parametrize("config", [None, "text", {}, {"mean": None, "std": None}, {"mean": 0.5, "std": 0.2}])
def test_an_unknown_normalisation_is_none(config: Any) -> None:
    assert normalisation_of(Configured(config)) is None
    assert normalisation_of(Configured({"mean": [0.5], "std": (0.2,)})) == ((0.5,), (0.2,))
