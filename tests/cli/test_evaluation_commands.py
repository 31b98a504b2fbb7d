"""`validate` and `test`: figures that can be read, and lines that say how far a run is where no bar is seen."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from helpers.models import digits_module
from lightning_prune import DigitsData, TokenPruning
from lightning_prune._utils import progress
from lightning_prune.callbacks.hooks import trainer_callbacks
from lightning_prune.cli import evaluation_commands
from lightning_prune.cli.evaluation_commands import EvaluationProgress, metrics_table, run_evaluation
from lightning_prune.cli.trainer import PruneTrainer


def printed(table: Any, width: int = 80) -> list[list[str]]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    return [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if "─" not in line
    ]


def test_figures_are_rounded_and_whole_numbers_stay() -> None:
    first = {"val/top1/dataloader_idx_0": 0.6899999976158142, "val/throughput/dataloader_idx_0": 20123.456}
    second = {"val/top1/dataloader_idx_1": 0.9725000262260437, "pruning/tokens": 128.0}
    rows = printed(metrics_table([first, second], "validate"))
    assert ["val/top1", "0.69", "0.9725"] in rows
    assert ["val/throughput", "20123", ""] in rows
    assert ["pruning/tokens", "", "128"] in rows
    assert any("Validate metric" in row for row in rows)


def trainer_of(verbose: bool) -> PruneTrainer:
    pruner = TokenPruning(schedule=0, time_limit=0.2, verbose=verbose)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return PruneTrainer(callbacks=[pruner], limit_val_batches=3, enable_model_summary=False, **options)


def test_what_is_returned_and_logged_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(verbose=False)
    before = list(trainer_callbacks(trainer))
    (found,) = run_evaluation(trainer, "validate", digits_module(), datamodule=DigitsData(batch_size=3))
    assert found["val/loss"] == float(trainer.callback_metrics["val/loss"])
    out = capsys.readouterr().out
    assert "val/loss" in out
    assert str(found["val/loss"]) not in out
    assert trainer_callbacks(trainer) == before
    run_evaluation(trainer, "validate", digits_module(), verbose=False, datamodule=DigitsData(batch_size=3))
    assert "val/loss" not in capsys.readouterr().out


@pytest.mark.parametrize(("verbose", "on_terminal"), [(True, False), (False, False), (True, True)])
def test_lines_say_how_far_it_is_where_no_bar_is_seen(
    verbose: bool, on_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    run_evaluation(trainer_of(verbose), "validate", digits_module(), datamodule=DigitsData(batch_size=3))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Validating")]
    shown = verbose and not on_terminal
    assert [line.split(":")[0] for line in lines if "batch" in line] == (
        ["Validating, batch 2 of 3", "Validating, batch 3 of 3"] if shown else []
    )


def test_the_time_that_is_left_is_that_of_the_batches_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(evaluation_commands.time, "perf_counter", lambda: now[0])
    each = EvaluationProgress("Testing")
    loop: Any = SimpleNamespace(testing=True, num_test_batches=[3, 2])  # as much of a trainer as is looked at
    each._before_batch(loop, None, None, 0, 0)
    for _ in range(3):
        each._after_batch()
        now[0] += 4.0
    assert each._whole is not None
    assert each._whole._end == pytest.approx(108.0 + 2 * 4.0)  # after 3 of 5 batches
    each._close(loop)
