"""The loggers of a trainer get the figures of the rows, and nothing of the validations in between."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

import lightning_prune as lp
from helpers.clock import TickingClock
from helpers.models import digits_module
from lightning_prune.comparison.loggers import log_rows
from lightning_prune.report.rows import Row

pytestmark = pytest.mark.usefixtures("clockwork")


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_figures_of_each_row_and_nothing_else(running: Any, tmp_path: Path) -> None:
    logger, model, data = CSVLogger(tmp_path, name="", version=""), digits_module(), lp.DigitsData(batch_size=8)
    trainer, pruner = running(schedule=50, logger=logger)
    found = lp.compare(trainer, model, data, clock=TickingClock())
    (line,) = lines_of(tmp_path)
    assert line.pop("step") == "0"
    expected = {
        f"compare/{row.variant}/{column}": value
        for row in found.rows
        for column, value in row.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert {"compare/dense/top1", "compare/pomt given/speedup", "compare/pomt given/latency_ms"} <= expected.keys()
    assert {name: float(value) for name, value in line.items()} == pytest.approx(expected)

    trainer.callbacks.remove(pruner)
    trainer.validate(model, data, verbose=False)  # the logger is as before
    assert lines_of(tmp_path)[-1]["val/top1"] != ""


class Stop(Exception):
    pass


class Stopping(L.Callback):
    def on_validation_epoch_end(self, *_: Any) -> None:
        raise Stop


def test_a_logger_is_as_before_after_an_error(running: Any, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _ = running(schedule=50, logger=logger)
    trainer.callbacks.append(Stopping())
    before = dict(vars(logger))
    with pytest.raises(Stop):
        lp.compare(trainer, digits_module(), lp.DigitsData(batch_size=8), clock=TickingClock())
    assert "log_metrics" not in before
    assert "log_metrics" not in vars(logger)


def test_names_that_loggers_refuse_are_changed(tmp_path: Path) -> None:
    trainer = L.Trainer(logger=CSVLogger(tmp_path, name="", version=""), accelerator="cpu", enable_checkpointing=False)
    log_rows(trainer, [Row(variant="pomt+int8 2x [torch.compile:mode=blocks]", top1=0.5, speedup=float("nan"))])
    assert lines_of(tmp_path) == [{"step": "0", "compare/pomt_int8 2x _torch.compile_mode_blocks_/top1": "0.5"}]
