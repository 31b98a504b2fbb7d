"""Measuring on the first batch of an evaluation loop: its images, precision, and random state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, TypeVar

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune._utils.random_state import preserve_random_state
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune._utils.trees import tree_leaves
from lightning_prune.callbacks.batches import Calibration, batch_shape, calibration_images, images_from_batch
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.callbacks.first_call import FirstCall
from lightning_prune.callbacks.hooks import command_run, limit_val_batches, without_bars
from lightning_prune.callbacks.passed_images import as_passed
from lightning_prune.callbacks.rank_agreement import (
    join_decision,
    on_rank_zero,
    refuse_sharded,
    refuse_spawned,
)
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.planning.paper_protocol import PAPER_IMAGES
from lightning_prune.profiling import measurement_context
from lightning_prune.profiling.clocks import CLOCKS

T = TypeVar("T")


class FirstBatch:
    """The first batch of an evaluation loop, with what is measured on it; `open_first_batch` makes one.

    Attributes:
        trainer: Whose loop runs.
        module: The module, dense.
        batch: As the step will receive it.
        config: The settings.
        call: What the step passes to the transformer, where that is known to differ from the images of the batch.
        limit: The time limit of what is measured on it.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batch: Any,
        config: PruningConfig,
        call: FirstCall | None = None,
        limit: TimeLimit | None = None,
    ) -> None:
        self.trainer, self.module, self.batch, self.config, self.call = trainer, module, batch, config, call
        self.limit = TimeLimit(config.time_limit, CLOCKS[config.clock]) if limit is None else limit

    def passing(self, call: FirstCall | None) -> "FirstBatch":
        """The same batch as the step passes it to the transformer.

        Args:
            call: What it passes; None for the images of the batch.
        """
        return FirstBatch(self.trainer, self.module, self.batch, self.config, call, self.limit)

    def within(self, share: float) -> "FirstBatch":
        """The same batch within a share of the time that is left.

        Args:
            share: From 0 to 1.
        """
        limit = TimeLimit(self.limit.share(share), self.limit.clock)
        return FirstBatch(self.trainer, self.module, self.batch, self.config, self.call, limit)

    @cached_property
    def images(self) -> Tensor:
        """(B, C, H, W), as the transformer receives them.

        Raises:
            ArgumentError: If there are none in the batch. Read them inside `on_rank_zero`: if only one rank raises, the
                others wait.
        """
        if self.call is not None:
            return self.call.images
        return images_from_batch(self.batch, self.config.images_from_batch)

    @cached_property
    def transformer(self) -> VisionTransformer:
        """The Vision Transformer in the module.

        Raises:
            UnsupportedModelError: If there is none, or several and the config names none.
        """
        return find_vision_transformer(self.module, self.config.module_path, self.config.restore)

    @cached_property
    def context(self) -> dict[str, Any]:
        """What a latency measured on this batch depends on; see `lightning_prune.profiling.measurement_context`."""
        return measurement_context(self.transformer.compiled_root, self.images, CLOCKS[self.config.clock])

    def calibration(self, limit: TimeLimit | None = None) -> Calibration:
        """The calibration images that the config asks for, from the running loop; no more than the loop itself reads.

        Args:
            limit: See `calibration_images`.

        Raises:
            ArgumentError: If a batch holds no images.
            DataError: If there are no batches, or images of several sizes.
        """
        wanted = self.config.calibration
        if self.config.protocol == "paper":
            return self.sample(wanted, PAPER_IMAGES)
        return self.sample(int(min(wanted, self._images_of_loop())) if isinstance(wanted, int) else wanted, limit=limit)

    def _images_of_loop(self) -> float:
        """How many images the loop reads on all ranks, if the user limits its batches; else infinity."""
        trainer, shape = self.trainer, batch_shape(self.batch, self.config.images_from_batch)
        limit = limit_val_batches(trainer)
        if not trainer.validating:
            limit = trainer.limit_test_batches if trainer.testing else trainer.limit_predict_batches
        if isinstance(limit, float):
            loader = next(iter(tree_leaves(getattr(self._loaders, "iterables", self._loaders))), None)
            limit = int(limit * len(loader)) if limit < 1 and isinstance(loader, DataLoader) else None
        return float("inf") if shape is None or limit is None else max(limit, 1) * shape.images * trainer.world_size

    @property
    def _loaders(self) -> Any:
        trainer = self.trainer
        loaders = trainer.val_dataloaders if trainer.validating else None
        if loaders is None:
            loaders = trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders
        return loaders

    def sample(self, calibration: Any, minimum: int = 0, limit: TimeLimit | None = None) -> Calibration:
        """Images of the dataset of the running loop.

        Args:
            calibration: How many, or the images, or a loader of batches.
            minimum: How many there are at least, if the dataset has as many.
            limit: See `calibration_images`.

        Raises:
            ArgumentError: If a batch holds no images.
            DataError: If there are no batches, or images of several sizes.
        """
        common = self.trainer, self.module, self._loaders, self.batch, self.config
        sampled = calibration_images(*common, calibration, minimum, limit)
        if self.call is None or isinstance(calibration, Tensor):  # the user gave what the transformer receives
            return sampled
        loaded = self.call.loaded
        if loaded is None:
            loaded = images_from_batch(self.batch, self.config.images_from_batch)
        return as_passed(sampled, loaded, self.call.images)

    def from_all_over(self, count: int) -> Tensor:
        """(N, C, H, W) images from all over the dataset, in the dtype and on the device of those of this batch.

        Folders are read class by class, so that the first batch shows one class, and at batch size 1 one image. From
        the first batch where the dataset cannot be sampled, or sizes differ.

        Args:
            count: N at most.
        """
        images = self.images
        try:
            found = self.sample(count).images
        except DataError:
            found = images
        same = found.shape[1:] == images.shape[1:]
        return (found if same else images)[:count].to(images.device, images.dtype)


def can_run(first: FirstBatch) -> bool:
    """Whether the transformer runs on the images of the batch as they are.

    Args:
        first: The batch, with the model dense.

    Raises:
        ArgumentError: If there are no images in the batch.
    """
    images = first.images
    try:
        first.transformer.count_tokens(images)
    except ArgumentError:
        return False
    return True


@contextmanager
def open_first_batch(
    trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, config: PruningConfig
) -> Iterator[FirstBatch]:
    """A context for measuring in the middle of a loop: preserves the random state and applies the trainer's precision.

    Enter it on every rank, in `on_*_batch_start`.

    Args:
        trainer: Whose loop runs.
        pl_module: The module.
        batch: The batch that the hook receives.
        config: The settings.

    Raises:
        UnsupportedModelError: If the strategy shards the model.
    """
    refuse_sharded(trainer)
    with preserve_random_state(), trainer.precision_plugin.forward_context():
        yield FirstBatch(trainer, pl_module, batch, config)


class _FirstBatchCallback(L.Callback, Generic[T]):
    """Calls a function with the first batch of a validation run, and keeps what it returns."""

    def __init__(self, config: PruningConfig, work: Callable[[FirstBatch], T]) -> None:
        self.config, self.work = config, work
        self.results: list[T] = []

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self.results:
            with open_first_batch(trainer, pl_module, batch, self.config) as first:
                self.results.append(on_rank_zero(trainer, lambda: self.work(first)))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.results:
            joined = join_decision(trainer)
            self.results += [] if joined is None else [joined]


def on_first_batch(
    trainer: L.Trainer,
    model: L.LightningModule,
    config: PruningConfig,
    work: Callable[[FirstBatch], T],
    *,
    dataloaders: Any = None,
    datamodule: L.LightningDataModule | None = None,
) -> T:
    """Runs one dense validation batch and returns on every rank what `work` returns on rank 0.

    Args:
        trainer: Whose validation loop runs.
        model: The module.
        config: The settings. A `TokenPruning` of the trainer is idle meanwhile.
        work: Called with the first batch, on rank 0, inside `open_first_batch`.
        dataloaders: As `Trainer.validate` takes them.
        datamodule: As `Trainer.validate` takes it.

    Raises:
        DataError: If there is no batch.
        UnsupportedModelError: If the strategy shards the model, or runs in processes of its own.
    """
    refuse_spawned(trainer)
    probe = _FirstBatchCallback(config, work)
    with command_run(trainer, config, probe, one_batch=True), without_bars(trainer):
        trainer.validate(model, dataloaders=dataloaders, verbose=False, datamodule=datamodule)
    if not probe.results:
        raise DataError("The validation loader must yield at least one batch, got none.")
    return probe.results[0]
