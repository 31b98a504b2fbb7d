"""Measuring on the first batch of an evaluation loop: images, precision, random state, and rank 0 deciding for all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar, cast

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune._utils.random_state import preserve_random_state
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune._utils.trees import tree_leaves
from lightning_prune.callbacks.batches import Calibration, batch_shape, calibration_images, images_from_batch
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.callbacks.first_call import FirstCall, as_passed
from lightning_prune.callbacks.hooks import command_run, limit_val_batches
from lightning_prune.errors import ArgumentError, DataError, PruneError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.planning.paper_protocol import PAPER_IMAGES
from lightning_prune.profiling import measurement_context

T = TypeVar("T")


def refuse_sharded(trainer: L.Trainer) -> None:
    """Refuses strategies that shard the model: a forward pass on rank 0 alone would wait for the other ranks.

    Args:
        trainer: Whose strategy it is.

    Raises:
        UnsupportedModelError: On every rank.
    """
    strategy = trainer.strategy
    names = {kind.__name__ for kind in type(strategy).__mro__}  # names, because pytorch_lightning has its own classes
    is_whole = "DDPStrategy" in names and "DeepSpeedStrategy" not in names  # the latter is derived from the former
    if trainer.world_size > 1 and not is_whole:
        raise UnsupportedModelError(
            f"TokenPruning needs the whole model in each process, which {type(strategy).__name__} with "
            f"{trainer.world_size} processes does not promise; evaluate with strategy='ddp' or on one device."
        )


class FirstBatch:
    """The first batch of an evaluation loop, with what is measured on it; `open_first_batch` makes one.

    Attributes:
        trainer: Whose loop runs.
        module: The module, dense.
        batch: As the step will receive it.
        config: The settings.
        call: What the step passed to the transformer, where that is known to differ from the images of the batch.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batch: Any,
        config: PruningConfig,
        call: FirstCall | None = None,
    ) -> None:
        self.trainer, self.module, self.batch, self.config, self.call = trainer, module, batch, config, call

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
        return find_vision_transformer(self.module, self.config.module_path)

    @cached_property
    def context(self) -> dict[str, Any]:
        """What a latency measured on this batch depends on; see `lightning_prune.profiling.measurement_context`."""
        return measurement_context(self.transformer.compiled_root, self.images)

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

    def on_rank_zero(self, decide: Callable[[], T]) -> T:
        """Returns on every rank what `decide` returns on rank 0; an error there is raised on every rank.

        If the error were raised on rank 0 only, the other ranks would wait until the process group times out and would
        then report a closed connection.

        Args:
            decide: Called on rank 0 only; its result must be picklable.

        Raises:
            DataError: If rank 0 has no batch.
            PruneError: On the other ranks, with the message of the error that rank 0 raises as it is.
        """
        result: T | None = None
        error: Exception | None = None
        if self.trainer.is_global_zero:
            try:
                result = decide()
            except Exception as caught:
                error = caught
        message = f"{type(error).__name__} on rank 0: {error}" if error else None
        outcome = _from_rank_zero(self.trainer, _Outcome(result, message), has_batch=True)
        if error is not None:
            raise error
        return cast(T, outcome)


class _Outcome(NamedTuple):
    """What rank 0 tells the others: the result, or the message of an error, or that it has no batch."""

    result: Any = None
    message: str | None = None
    has_batch: bool = True


def _from_rank_zero(trainer: L.Trainer, outcome: _Outcome, has_batch: bool) -> Any:
    """The result of rank 0, on every rank.

    Args:
        trainer: Of this rank.
        outcome: That of this rank; counts on rank 0.
        has_batch: Whether this rank has a batch.

    Raises:
        DataError: On every rank, if rank 0 has no batch and another rank has.
        PruneError: On ranks other than 0, if there was an error on rank 0.
    """
    result, message, decided = trainer.strategy.broadcast(outcome)
    if not decided:
        if trainer.strategy.reduce_boolean_decision(has_batch, all=False):
            raise DataError(
                "The loader must yield at least one batch on rank 0, which decides for all ranks, got none there and "
                "batches on other ranks."
            )
        return None
    if message is not None and not trainer.is_global_zero:
        raise PruneError(message)
    return result


def join_decision(trainer: L.Trainer) -> Any:
    """Takes part in `FirstBatch.on_rank_zero` on a rank whose loaders yielded no batch.

    Streams may be divided so that a rank gets none. Without this the other ranks would wait in `on_rank_zero` while
    this one is in the next collective operation, and the run would end in an error of the process group. Call it in
    `on_*_epoch_end`, which is the first hook of that rank after the others have decided.

    Args:
        trainer: Of this rank.

    Returns:
        What rank 0 decided; None if no rank has a batch, or there is one process.

    Raises:
        DataError: On every rank, if rank 0 has no batch and another rank has.
        PruneError: On ranks other than 0, if there was an error on rank 0.
        UnsupportedModelError: If the strategy shards the model.
    """
    if trainer.world_size == 1:
        return None
    refuse_sharded(trainer)
    return _from_rank_zero(trainer, _Outcome(has_batch=False), has_batch=False)


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
                self.results.append(first.on_rank_zero(lambda: self.work(first)))

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
        UnsupportedModelError: If the strategy shards the model.
    """
    probe = _FirstBatchCallback(config, work)
    with command_run(trainer, config, probe, one_batch=True):
        trainer.validate(model, dataloaders=dataloaders, verbose=False, datamodule=datamodule)
    if not probe.results:
        raise DataError("The validation loader must yield at least one batch, got none.")
    return probe.results[0]
