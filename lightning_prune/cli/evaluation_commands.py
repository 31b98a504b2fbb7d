"""The commands `validate` and `test`: Lightning's run, a table of its metrics, and progress where no bar is seen."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from lightning_prune._utils.formatting import figure
from lightning_prune._utils.progress import WorkProgress
from lightning_prune.callbacks import config_of
from lightning_prune.callbacks.hooks import EvaluationCallback, trainer_callbacks

_DOING = {"validate": "Validating", "test": "Testing"}


class EvaluationProgress(EvaluationCallback):
    """Shows how far a validation or test is where Lightning's bar is not seen, on standard error.

    It begins after the first batch, so that planning, which shows its own progress, is no part of it.

    Args:
        whole: What is done.
    """

    def __init__(self, whole: str) -> None:
        self._name, self._done, self._start = whole, 0, 0.0
        self._trainer: L.Trainer | None = None
        self._whole: WorkProgress | None = None
        self._shown = ExitStack()

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        self._trainer = trainer

    def _after_batch(self) -> None:
        now = time.perf_counter()
        if self._whole is None:
            self._whole, self._done, self._start = WorkProgress(self._name, None), 0, now
            self._shown.enter_context(self._whole.shown())
            return
        self._done += 1
        batches = self._batches()
        # One batch more has run than are timed.
        left = (batches - self._done - 1) * (now - self._start) / self._done
        of = "" if batches == float("inf") else f" of {batches:.0f}"
        self._whole.whole = f"{self._name}, batch {self._done + 1}{of}"
        self._whole.expect(max(left, 0.0))

    def _batches(self) -> float:
        """The number of batches of all loaders; infinite for a stream."""
        if self._trainer is None:
            return float("inf")
        return float(sum(self._trainer.num_test_batches if self._trainer.testing else self._trainer.num_val_batches))

    def _figures(self) -> dict[str, float]:
        return {}

    def _close(self, trainer: L.Trainer) -> None:
        self._whole, self._trainer = None, None
        self._shown.close()


def run_evaluation(
    trainer: L.Trainer, command: str, model: L.LightningModule, verbose: bool = True, **arguments: Any
) -> Sequence[Mapping[str, float]]:
    """Validates or tests, and prints a table of the metrics, rounded; what is logged and returned is exact.

    Args:
        trainer: Runs the loop.
        command: `"validate"` or `"test"`.
        model: The module.
        verbose: Whether to print the table.
        arguments: As the method of the trainer takes them.

    Returns:
        The metrics of each loader.
    """
    callbacks = trainer_callbacks(trainer)
    has_bar = getattr(trainer, "progress_bar_callback", None) is not None  # else the user wants none
    added = []
    if trainer.is_global_zero and config_of(trainer).verbose and has_bar and not sys.stdout.isatty():
        added = [EvaluationProgress(_DOING[command])]
    callbacks += added
    try:
        results: Sequence[Mapping[str, float]] = getattr(trainer, command)(model, verbose=False, **arguments)
    finally:
        for each in added:
            callbacks.remove(each)
    if verbose and trainer.is_global_zero and any(results):
        Console(markup=False).print(metrics_table(results, command))
    return results


def metrics_table(results: Sequence[Mapping[str, float]], command: str) -> Table:
    """The metrics of a run in the layout of Lightning's table, a column for each loader, in about four digits.

    Args:
        results: What `Trainer.validate` or `Trainer.test` returns.
        command: `"validate"` or `"test"`.
    """
    plain = [{name.split("/dataloader_idx_")[0]: value for name, value in each.items()} for each in results]
    table = Table()
    table.add_column(f"{command.capitalize()} metric", style="cyan", justify="center", overflow="fold")
    for number in range(len(plain)):
        table.add_column(f"DataLoader {number}", style="magenta", justify="center")
    for name in sorted(set().union(*plain)):
        table.add_row(name, *(figure(each[name]) if name in each else "" for each in plain))
    return table
