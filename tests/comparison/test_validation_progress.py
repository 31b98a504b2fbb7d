"""A comparison shows one progress of all that it does, and none of Lightning's bars for each variant."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

import lightning_prune as lp
from lightning_prune._utils import progress
from lightning_prune._utils.progress import WorkProgress
from lightning_prune.comparison import validation_progress
from lightning_prune.comparison.validation_progress import ValidationProgress

from .conftest import clock_of


def test_planning_timing_and_validation_are_one_progress(
    clocked_module: Any, running: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: list[str] = []
    shown = WorkProgress.shown

    @contextmanager
    def counted(self: WorkProgress) -> Iterator[None]:
        whole.append(self.whole)
        with shown(self):
            yield

    monkeypatch.setattr(WorkProgress, "shown", counted)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    trainer, _ = running(verbose=True, calibration=8, enable_progress_bar=True, method="topk")
    model, data = clocked_module(), lp.DigitsData(batch_size=8)
    lp.compare(trainer, model, data, ["topk"], on_message=lambda _: None, clock=clock_of(model))
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("Comparing: ")]
    # Without times, and without how far each part was.
    parts = list(dict.fromkeys(re.sub(r": [\d min]+s (of [\d min]+s )?taken.*|, .*", "", line) for line in lines))
    assert whole == ["Comparing"]
    wanted = [
        "Comparing: planning topk accuracy budget",
        "Comparing: planning topk accuracy budget: overhead of the methods: comparing latency",
        "Comparing: planning topk accuracy budget: sensitivity of the blocks",
        "Comparing: planning topk accuracy budget: accuracy of topk",
        "Comparing: timing all variants",
        "Comparing: validating dense (1 of 2)",
        "Comparing: validating topk accuracy budget (2 of 2)",
    ]
    assert [part for part in parts if part in wanted] == wanted
    timing = next(line for line in lines if "timing all variants" in line)
    assert any(re.search(r"sensitivity of the blocks, topk, block \d+ of \d+, after \d+ images", s) for s in lines)
    assert re.search(r"taken, about (1 min 00|[45]\d) s left$", timing)  # of the time limit
    assert lines[-1].endswith("about 0 s left")
    assert "DataLoader" not in printed.out + printed.err
    assert trainer.progress_bar_callback.is_enabled


def test_the_time_left_is_that_of_all_batches_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], []
    monkeypatch.setattr(validation_progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(validation_progress, "expect_seconds", said.append)
    callback, trainer = ValidationProgress(), SimpleNamespace(num_val_batches=[4])
    for runs_left in (3, 2):
        callback.runs_left = runs_left
        now[0] += 100.0  # between two validations
        callback.on_validation_start(trainer, None)
        for batch in range(4):
            now[0] += 2.0
            callback.on_validation_batch_end(trainer, None, None, None, batch)
    assert said == pytest.approx([22.0, 20.0, 18.0, 16.0, 14.0, 12.0, 10.0, 8.0])
