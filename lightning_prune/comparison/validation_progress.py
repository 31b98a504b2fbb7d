"""The progress of the validations of a comparison: a part of that of the whole, in place of a bar for each."""

import time
from typing import Any

import lightning as L

from lightning_prune._utils.progress import expect_seconds


class ValidationProgress(L.Callback):
    """Says after each batch about how long all validations will take yet, by the mean time of the batches so far.

    Attributes:
        runs_left: Number of validations that are left, the present one included.
    """

    def __init__(self) -> None:
        self.runs_left, self._batches, self._seconds = 1, 0, 0.0
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count: what is between two validations is no part of a batch."""
        self._started = time.perf_counter()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Says what is left."""
        now = time.perf_counter()
        self._batches, self._seconds, self._started = self._batches + 1, self._seconds + now - self._started, now
        batches = float(sum(trainer.num_val_batches))  # infinite for a stream
        left = batches * self.runs_left - (batch_idx + 1)
        expect_seconds(max(left, 0.0) * self._seconds / self._batches)
