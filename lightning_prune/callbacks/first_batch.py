"""Doing something with the first batch of a validation run, as the trainer's strategy and precision would have it."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import lightning as L
from torch import Tensor

from lightning_prune._utils.device import preserve_random_state
from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.batches import images_from_batch
from lightning_prune.callbacks.distributed import decided_by_rank_zero, refuse_sharded
from lightning_prune.callbacks.hooks import trainer_callbacks
from lightning_prune.errors import ArgumentError

T = TypeVar("T")
Work = Callable[[L.LightningModule, Any, Tensor], T]  # of the module, a batch, and the images in it


def on_first_batch(trainer: L.Trainer, model: L.LightningModule, pruner: TokenPruning, work: Work[T], **data: Any) -> T:
    """What `work` returns of the first validation batch; on rank 0, for all ranks.

    Args:
        trainer: Whose validation loop runs, for one batch, dense.
        model: The module.
        pruner: Says where the images of a batch are; prunes nothing meanwhile.
        work: What is to be done, under the trainer's precision.
        data: `datamodule` or `dataloaders`, as `Trainer.validate` takes them.

    Raises:
        ArgumentError: If there is no batch.
        UnsupportedModelError: If the model is spread over processes.
    """
    probe = _Probe(pruner, work)
    callbacks = trainer_callbacks(trainer)
    settings = trainer.limit_val_batches, pruner.enabled
    trainer.limit_val_batches, pruner.enabled = 1, False
    callbacks.append(probe)
    try:
        trainer.validate(model, verbose=False, **data)
    finally:
        callbacks.remove(probe)
        trainer.limit_val_batches, pruner.enabled = settings
    if not probe.results:
        raise ArgumentError("The validation loader yielded no batch to profile on.")
    return probe.results[0]


class _Probe(L.Callback, Generic[T]):
    def __init__(self, pruner: TokenPruning, work: Work[T]) -> None:
        self.pruner, self.work = pruner, work
        self.results: list[T] = []

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.results:
            return
        refuse_sharded(trainer)
        self.pruner.compilation.begin(self.pruner, pl_module)

        def do() -> T:
            images = images_from_batch(batch, self.pruner.images_from_batch)
            with preserve_random_state(), trainer.precision_plugin.forward_context():
                return self.work(pl_module, batch, images)

        self.results.append(decided_by_rank_zero(trainer, do))
