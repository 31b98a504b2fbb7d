"""Runs of a command: without Lightning's bars."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

import lightning_prune as lp
from helpers.models import digits_module
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.first_batch import on_first_batch
from lightning_prune.callbacks.hooks import without_bars


def test_a_bar_that_the_user_has_disabled_stays_so() -> None:
    bar = TQDMProgressBar()
    for enabled in (True, False):
        bar._enabled = enabled
        with without_bars(SimpleNamespace(progress_bar_callback=bar)):
            assert not bar.is_enabled
        assert bar.is_enabled == enabled
    with without_bars(SimpleNamespace(progress_bar_callback=None)):
        pass


def test_the_one_batch_of_a_command_has_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(**options)
    data = lp.DigitsData(batch_size=2)
    seen = on_first_batch(trainer, digits_module(), PruningConfig(), lambda first: len(first.images), datamodule=data)
    assert seen == 2
    printed = capsys.readouterr()
    assert "Validation" not in printed.out + printed.err
    assert trainer.progress_bar_callback.is_enabled
