"""The hooks of Lightning's loops that begin and end a pruned run."""

from abc import ABC, abstractmethod
from typing import Any

import lightning as L


def trainer_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """The trainer's own list of callbacks: what is added to it takes part in the next run."""
    callbacks: list[L.Callback] = vars(trainer)["callbacks"]
    return callbacks


class EvaluationCallback(L.Callback, ABC):
    """Does before a batch, at the end of an epoch and at the end of a run what a subclass says, in all three loops."""

    @abstractmethod
    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Called with each batch: it is on the device in its dtype, and its step has not run."""

    def _after_batch(self) -> None:
        """Called when the step of a batch has run."""

    @abstractmethod
    def _figures(self) -> dict[str, float]:
        """What to log at the end of an epoch; may be empty."""

    @abstractmethod
    def _close(self, trainer: L.Trainer) -> None:
        """Called when a run of `trainer` ends, by whatever cause and perhaps more than once."""

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Acts on the batch before its step."""
        self._before_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See `on_validation_batch_start`."""
        self._before_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See `on_validation_batch_start`."""
        self._before_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Acts after the step."""
        self._after_batch()

    def on_test_batch_end(self, *_: Any) -> None:
        """See `on_validation_batch_end`."""
        self._after_batch()

    def on_predict_batch_end(self, *_: Any) -> None:
        """See `on_validation_batch_end`."""
        self._after_batch()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the figures."""
        pl_module.log_dict(self._figures(), sync_dist=True, add_dataloader_idx=False)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the figures."""
        pl_module.log_dict(self._figures(), sync_dist=True, add_dataloader_idx=False)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hands the figures to the loggers themselves: `log` is not to be had in predict."""
        figures = self._figures()
        for logger in trainer.loggers if figures else ():
            logger.log_metrics(figures, step=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the run."""
        self._close(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the run."""
        self._close(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the run."""
        self._close(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the run: after an exception or Ctrl-C this is called and `teardown` may not be."""
        self._close(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Closes the run, if nothing has before."""
        self._close(trainer)
