"""A comparison that ends before its end: what is kept, what is said, and full disks."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from timm.layers import Mlp
from torch import Tensor

import lightning_prune as lp
from helpers import ROOT
from helpers.clock import TickingClock
from helpers.fresh import run_fresh
from lightning_prune.comparison import comparison_planning
from lightning_prune.comparison.comparison_planning import ComparisonPlanner
from lightning_prune.comparison.planned_variants import PlannedVariant
from lightning_prune.comparison.resume import ResumeState, VariantResult
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.sensitivity import Sensitivity
from lightning_prune.profiling.accuracy_store import AccuracyStore
from lightning_prune.report import styles

from .conftest import clock_of

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*_: Any, **__: Any) -> Any:
    raise FULL


def run(model: Any, running: Any, output: Path, messages: list[str], **more: Any) -> Any:
    trainer, _ = running(calibration=8)
    data = lp.DigitsData(batch_size=8)
    clock = clock_of(model)
    methods = ["topk", "random"]
    return lp.compare(trainer, model, data, methods, output=output, on_message=messages.append, clock=clock, **more)


def stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.long
def test_what_is_planned_before_an_interruption_is_not_planned_again(
    clocked_module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, planned, messages = clocked_module(), [], []
    real = comparison_planning.planned_for

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(planned) == 1 and not messages.count("stopped"):
            messages.append("stopped")
            raise KeyboardInterrupt
        planned.append(args[0].method)
        return real(*args, **kwargs)

    monkeypatch.setattr(comparison_planning, "planned_for", counted)
    with pytest.raises(SystemExit) as error:  # Lightning turns Ctrl-C into an exit
        run(model, running, tmp_path, messages)
    (note,) = error.value.__notes__
    assert str(tmp_path / "state") in note
    assert "the schedules of topk accuracy budget. The same comparison" in note
    found = run(model, running, tmp_path, messages)
    assert len(planned) == 2
    assert [message for message in messages if message.startswith("Planned before")] == [
        "Planned before: topk accuracy budget"
    ]
    monkeypatch.undo()
    again = run(clocked_module(), running, tmp_path / "whole", [])
    assert [row.variant for row in found.rows] == [row.variant for row in again.rows]
    assert [row.removed for row in found.rows] == [row.removed for row in again.rows]
    assert [row.top1 for row in found.rows] == [row.top1 for row in again.rows]


def test_an_interruption_of_validation_says_how_much_is_kept(
    clocked_module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ResumeState.keep_result

    def keep_and_stop(self: ResumeState, variant: str, result: VariantResult) -> None:
        keep(self, variant, result)
        stopped()

    monkeypatch.setattr(ResumeState, "keep_result", keep_and_stop)
    with pytest.raises(KeyboardInterrupt) as error:
        run(clocked_module(), running, tmp_path, [])
    (note,) = error.value.__notes__
    assert "the plan and 1 of 3 validated variants" in note


@pytest.fixture
def tokens_clock(monkeypatch: pytest.MonkeyPatch) -> TickingClock:
    """A clock on which each block takes 0.5 ms a token, also of a model that looks like any other."""
    clock, forward = TickingClock(0.0), Mlp.forward

    def timed(self: Mlp, x: Tensor) -> Tensor:
        clock.now += 5e-4 * x.shape[1]
        return forward(self, x)

    monkeypatch.setattr(Mlp, "forward", timed)
    return clock


def test_of_an_interrupted_search_for_speedups_only_timings_are_repeated(
    module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens_clock: TickingClock
) -> None:
    model, made, real = module(), list[Any](), ComparisonPlanner._time_all
    keep, add, time_candidates = AccuracyStore.keep_estimate, Sensitivity.add, Measurements.time_candidates

    def noted(function: Any, name: str) -> Any:
        def run(*args: Any) -> Any:
            made.append((name, args[1].name, args[2].removed) if name == "estimate" else name)
            return function(*args)

        return run

    def compared() -> tuple[Any, list[Any]]:
        made.clear()
        trainer, _ = running(calibration=8, time_limit=40, limit_val_batches=1)
        data = lp.DigitsData(batch_size=8)
        found = lp.compare(trainer, model, data, ["auto"], [1.2], output=tmp_path, clock=tokens_clock)
        return found, list(made)

    monkeypatch.setattr(AccuracyStore, "keep_estimate", noted(keep, "estimate"))
    monkeypatch.setattr(Sensitivity, "add", noted(add, "sensitivity"))
    monkeypatch.setattr(Measurements, "time_candidates", noted(time_candidates, "timing"))
    monkeypatch.setattr(ComparisonPlanner, "_time_all", stopped)
    with pytest.raises(SystemExit) as error:
        compared()
    (note,) = error.value.__notes__
    assert "estimates of accuracy are kept; timings are repeated" in note
    first = list(made)
    estimates = {each for each in first if each[0] == "estimate"}
    assert estimates
    assert {"sensitivity", "timing"} <= set(first)
    monkeypatch.setattr(ComparisonPlanner, "_time_all", real)
    found, second = compared()
    assert found.rows[1].speedup > 1.15
    assert "timing" in second
    assert "sensitivity" not in second
    assert not estimates & set(second)


def test_a_full_disk_at_the_end_is_an_error_after_the_table(
    clocked_module: Any,
    running: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(styles.Figure, "savefig", fail)
    monkeypatch.setenv("COLUMNS", "120")  # names of variants are not folded
    shown: list[Any] = []
    name = tmp_path / "profile.png"
    with pytest.raises(lp.FileWriteError, match=f"Cannot write {name}: No space left on device"):
        run(clocked_module(), running, tmp_path, [])
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("dense", "topk accuracy budget", "random accuracy budget"))
    with pytest.raises(lp.FileWriteError):  # from what is kept, so no time is lost
        run(clocked_module(), running, tmp_path, [], on_results=shown.append)
    assert capsys.readouterr().out == ""
    assert [row.variant for row in shown[0].rows][:1] == ["dense"]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_full_disk_on_the_way_is_a_warning(
    clocked_module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if {"variants", "groups"} & {*self.parts} or "plan" in self.name:
            raise FULL
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="start again: Cannot write .*No space left on device") as told:
        found = run(clocked_module(), running, tmp_path, [])
    assert len([each for each in told if "start again" in str(each.message)]) == 1
    assert (tmp_path / "results.csv").exists()
    assert len(found.rows) == 3


def test_a_group_of_another_name_or_damaged_is_not_kept(tmp_path: Path) -> None:
    state = ResumeState(tmp_path, {"a": 1})
    state.keep_group("x", [PlannedVariant("x", "x", "pomt", schedule=lp.Schedule([0, 3], "pomt"))])
    assert ResumeState(tmp_path, {"a": 1}).group("x") == state.group("x") != []
    assert state.group("y") is None
    path = state.folder / "groups" / "x.json"
    path.write_text(path.read_text().replace('"removed"', '"other"'))
    assert state.group("x") is None
    assert ResumeState(tmp_path / "new", {"a": 1}).summary() == ""


SCRIPT = """
import os, signal, sys
import lightning as L
import lightning_prune as lp
from helpers.models import digits_module
from lightning_prune.comparison.comparison_planning import ComparisonPlanner
plan = ComparisonPlanner.plan
def planning(self):
    os.kill(os.getpid(), signal.SIGTERM)
    found = plan(self)
    print("planned")
    return found
ComparisonPlanner.plan = planning
options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
pruner = lp.TokenPruning("pomt", time_limit=0.2, calibration=4, verbose=False, schedule=20)
trainer = L.Trainer(callbacks=[pruner], limit_val_batches=1, **options)
lp.compare(trainer, digits_module(), lp.DigitsData(batch_size=4), output=sys.argv[1])
print("finished")
"""


@pytest.mark.long
def test_sigterm_in_a_script_ends_it_with_its_status(tmp_path: Path) -> None:
    """Lightning looks for it between batches only, and planning is in the only one of its run."""
    run = run_fresh(f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{SCRIPT}", str(tmp_path))
    assert run.returncode == 143, run.stderr
    assert "planned" not in run.stdout
    assert "finished" not in run.stdout
    assert not list(tmp_path.iterdir())
