"""Lightning's hooks in evaluation loops and checkpoints, and the runs of commands, in which `TokenPruning` is idle."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
from torch import nn

from lightning_prune._utils.trees import tree_leaves
from lightning_prune.callbacks.batches import images_from_batch
from lightning_prune.callbacks.compiled_run import CompiledRun
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.patching import unpatch
from lightning_prune.patching.class_swap import is_patched_module


def trainer_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """The trainer's own list of callbacks, `trainer.callbacks`, which type checkers do not see.

    A callback that is added to it takes part in the next run.
    """
    return cast(list[L.Callback], cast(Any, trainer).callbacks)


class EvaluationCallback(L.Callback, ABC):
    """Base of callbacks that act around a batch, at the end of an epoch and at the end of a run, in all three loops."""

    @abstractmethod
    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Called with each batch: it is on the device in its dtype, and its step has not run."""

    def _after_batch(self) -> None:
        """Called when the step of a batch has run."""

    @abstractmethod
    def _figures(self) -> dict[str, float]:
        """Metrics to log at the end of an epoch; may be empty."""

    def _before_figures(self, trainer: L.Trainer) -> None:
        """Called at the end of an epoch, before `_figures`, on ranks without a batch, too."""

    @abstractmethod
    def _close(self, trainer: L.Trainer) -> None:
        """Called when a run of `trainer` ends, also by an error, and perhaps more than once."""

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Calls `_before_batch`."""
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

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Calls `_after_batch`."""
        self._after_batch()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """See `on_validation_batch_end`."""
        self._after_batch()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """See `on_validation_batch_end`."""
        self._after_batch()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the metrics."""
        self._before_figures(trainer)
        pl_module.log_dict(self._figures(), sync_dist=True, add_dataloader_idx=False)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the metrics."""
        self._before_figures(trainer)
        pl_module.log_dict(self._figures(), sync_dist=True, add_dataloader_idx=False)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Passes the metrics to the loggers directly, since `log` cannot be called in predict."""
        self._before_figures(trainer)
        figures = self._figures()
        for logger in trainer.loggers if figures else ():
            logger.log_metrics(figures, step=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the run."""
        self._close(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the run."""
        self._close(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the run."""
        self._close(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the run: after an exception or Ctrl-C Lightning calls this, and not always `teardown`."""
        self._close(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the run, unless an earlier hook has."""
        self._close(trainer)


class CommandRun(EvaluationCallback):
    """Marks the runs of a command, in which `TokenPruning` is idle; the transformer is compiled in them as usual.

    Args:
        config: Its `runtime` is what runs the transformer.
        limit: The `limit_val_batches` of the user.
    """

    def __init__(self, config: PruningConfig, limit: int | float | None) -> None:
        self.config, self.limit = config, limit
        self._compiled = CompiledRun()

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        # A command that uses what this run computes gives the images itself; else any do.
        self._compiled.before_batch(
            self.config,
            pl_module,
            batch,
            batch_idx == 0,
            lambda: images_from_batch(batch, self.config.images_from_batch),
        )

    def _figures(self) -> dict[str, float]:
        return {}

    def _close(self, trainer: L.Trainer) -> None:
        self._compiled.end()


def is_command_run(trainer: L.Trainer) -> bool:
    """Whether the runs of a trainer are those of a command."""
    return any(isinstance(callback, CommandRun) for callback in trainer_callbacks(trainer))


def limit_val_batches(trainer: L.Trainer) -> int | float | None:
    """The `limit_val_batches` of the user, also during a command's run of one batch."""
    commands = [callback for callback in trainer_callbacks(trainer) if isinstance(callback, CommandRun)]
    return commands[-1].limit if commands else trainer.limit_val_batches


@contextmanager
def command_run(
    trainer: L.Trainer, config: PruningConfig, *callbacks: L.Callback, one_batch: bool = False
) -> Iterator[None]:
    """A context in which the trainer's runs are those of a command: its `TokenPruning` is idle.

    The trainer's own callbacks are not changed, and `callbacks` come before them, so that they see the model restored
    when a run ends or fails.

    Args:
        trainer: Whose runs they are.
        config: The settings.
        callbacks: What takes part in these runs.
        one_batch: Whether a validation has one batch; it has none where the user limited it to none.
    """
    limit = trainer.limit_val_batches
    added = [CommandRun(config, limit_val_batches(trainer)), *callbacks]
    trainer_callbacks(trainer)[:0] = added
    if one_batch:
        trainer.limit_val_batches = 1 if limit is None or limit > 0 else 0
    try:
        yield
    finally:
        trainer.limit_val_batches = limit
        for callback in added:
            trainer_callbacks(trainer).remove(callback)


@contextmanager
def without_bars(trainer: L.Trainer) -> Iterator[None]:
    """A context in which the trainer shows no bar for each of its runs.

    Args:
        trainer: Whose runs they are.
    """
    bar = getattr(trainer, "progress_bar_callback", None)
    if bar is None or not getattr(bar, "is_enabled", True):
        yield
        return
    bar.disable()
    try:
        yield
    finally:
        bar.enable()


def unpatch_hyperparameters(checkpoint: dict[str, Any]) -> None:
    """Replaces patched modules among the hyperparameters of a checkpoint by unpatched copies, in place.

    Weights are the same with and without a patch, but a module that was passed to a LightningModule may be one of its
    hyperparameters, and is pickled as it is.

    Args:
        checkpoint: As `on_save_checkpoint` receives it.
    """
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        for name, value in dict(checkpoint.get(key, {})).items():
            if any(map(_is_patched, tree_leaves(value))):
                checkpoint[key][name] = dense = copy.deepcopy(value)
                for leaf in filter(_is_patched, tree_leaves(dense)):
                    unpatch(leaf)


def _is_patched(value: Any) -> bool:
    return isinstance(value, nn.Module) and any(is_patched_module(module) for module in value.modules())
