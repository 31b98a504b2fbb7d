"""The command `vocabulary`: learns visual words from the images of the prediction loader."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor

from lightning_prune._utils.files import ensure_output_dir, user_path
from lightning_prune._utils.trees import tree_map
from lightning_prune._utils.validation import check, check_int
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.batches import images_from_batch
from lightning_prune.callbacks.hooks import command_run
from lightning_prune.errors import DataError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.reduction import tokens_per_image
from lightning_prune.reduction.patchify import patch_side
from lightning_prune.reduction.vocabulary import Vocabulary
from lightning_prune.reduction.word_learning import WordLearner

_SHOWN = 64  # images whose tokens are counted for the report
_THRESHOLDS = (0.1, 0.2)


def learn_words(
    trainer: L.Trainer,
    model: L.LightningModule,
    config: PruningConfig,
    output: str,
    words: int,
    limit: int | None,
    seed: int,
    dataloaders: Any = None,
    datamodule: L.LightningDataModule | None = None,
) -> Vocabulary:
    """Learns visual words by k-means from the images of the prediction loader; saves them and prints token counts.

    The module's hooks run, so that the images are those that its transformer receives; its `predict_step` does not.

    Args:
        trainer: Runs its prediction loop, in one process.
        model: Contains the Vision Transformer. If it has a `data_config` with mean and std, the vocabulary stores them.
        config: Gives the path of the transformer, and how images are taken from a batch.
        output: The file to write, `.safetensors`.
        words: Number of words.
        limit: Number of images to learn from; None for all.
        seed: Seed of k-means.
        dataloaders: Prediction loaders, if there is no datamodule.
        datamodule: Provides the prediction loader.

    Raises:
        ArgumentError: If an argument is invalid, or there are more words than patches.
        DataError: If there are no images.
        FileWriteError: If the file cannot be written, after the report is printed.
    """
    check("output", output, "a file that ends in .safetensors", Path(output).suffix == ".safetensors")
    if limit is not None:
        check_int("limit", limit, 1, "a number of images")
    processes = trainer.world_size
    check("trainer.devices", processes, "1, because the words are learned in one process", processes == 1)
    ensure_output_dir(user_path(output).absolute().parent)
    reader = _Reader(config, words, limit, seed)
    limited = None if dataloaders is None else _limit(dataloaders, reader)
    with command_run(trainer, config, reader), _replaced_methods(reader, model, datamodule):
        trainer.predict(model, limited, datamodule, return_predictions=False)
    if reader.learner is None:
        raise DataError("The prediction loader must yield at least one batch, got none.")
    with Console(stderr=True).status(f"Learning the last of {words} words"):
        vocabulary = reader.learner.finish(*_normalisation(model, config.module_path, reader.last.shape[1]))
    console = Console(markup=False)
    _print_report(console, vocabulary, reader)
    console.print(f"Written: {vocabulary.save(output)}", soft_wrap=True, highlight=False)
    return vocabulary


class _Reader(L.Callback):
    """Learns words from the batches of a prediction run, up to a number of images."""

    def __init__(self, config: PruningConfig, words: int, limit: int | None, seed: int) -> None:
        self.config, self.words, self.limit, self.seed = config, words, limit, seed
        self.learner: WordLearner | None = None
        self.last = torch.empty(0)

    def is_done(self) -> bool:
        """Whether the limit is reached."""
        return self.learner is not None and self.learner.images == self.limit

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.is_done():  # Lightning may load one batch ahead
            return
        images = images_from_batch(batch, self.config.images_from_batch)
        if self.learner is None:
            with trainer.precision_plugin.forward_context():
                side = _patch_size(pl_module, images, self.config.module_path)
                self.learner = WordLearner(side, self.words, self.seed)
        left = len(images) if self.limit is None else self.limit - self.learner.images
        images = images[:left].detach().cpu().float()
        self.learner.add(images)
        same = self.last.shape[1:] == images.shape[1:]
        self.last = torch.cat((self.last, images))[-_SHOWN:] if same else images[-_SHOWN:]


class _LimitedLoader:
    """A prediction loader that ends when the reader has enough images: Lightning cannot end a prediction run early."""

    def __init__(self, loader: Any, reader: _Reader) -> None:
        self.loader, self.reader = loader, reader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.reader.is_done():
            return
        for batch in self.loader:
            yield batch
            if self.reader.is_done():
                return


def _limit(loaders: Any, reader: _Reader) -> Any:
    """Limits every loader in a collection, as `Trainer.predict` accepts one."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    return tree_map(lambda loader: _LimitedLoader(loader, reader), loaders)


@contextmanager
def _replaced_methods(
    reader: _Reader, model: L.LightningModule, datamodule: L.LightningDataModule | None
) -> Iterator[None]:
    """Skips the module's `predict_step` and limits the loaders of `predict_dataloader`; restores both on exit."""
    with ExitStack() as stack:
        stack.enter_context(_replaced(model, "predict_step", lambda *_, **__: ()))
        for owner in (model, datamodule):
            if owner is not None and is_overridden("predict_dataloader", owner):
                limited = partial(_limited, owner.predict_dataloader, reader)
                stack.enter_context(_replaced(owner, "predict_dataloader", limited))
        yield


def _limited(predict_dataloader: Callable[[], Any], reader: _Reader) -> Any:
    return _limit(predict_dataloader(), reader)


@contextmanager
def _replaced(owner: object, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replaces a method of one instance."""
    attributes = vars(owner)
    before = attributes.get(name)
    attributes[name] = method
    try:
        yield
    finally:
        del attributes[name]
        if before is not None:
            attributes[name] = before


def _patch_size(module: L.LightningModule, images: Tensor, module_path: str | None) -> int:
    """The side of the transformer's patches, computed from the number of tokens of an image."""
    transformer = find_vision_transformer(module, module_path)
    with ready_to_run(transformer):
        patches = transformer.count_tokens(images[:1]) - transformer.num_prefix_tokens
    return patch_side(images.shape[2], images.shape[3], patches)


def _normalisation(module: L.LightningModule, module_path: str | None, channels: int) -> tuple[Any, Any]:
    """Mean and std of each channel, from the data config of the module or of its transformer.

    Both are None if there is no config, or if it is for another number of channels.
    """
    transformer: Any = find_vision_transformer(module, module_path).root
    config = getattr(module, "data_config", None) or getattr(transformer, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    return (mean, std) if mean is not None and std is not None and len(mean) == len(std) == channels else (None, None)


def _print_report(console: Console, vocabulary: Vocabulary, reader: _Reader) -> None:
    images = reader.learner.images if reader.learner else 0
    side = vocabulary.patch_size
    lines = [
        f"{len(vocabulary)} words for patches of {vocabulary.channels} x {side} x {side}, learned from {images} images",
        *(f"threshold {each}: {tokens_per_image([reader.last], vocabulary, each)}" for each in _THRESHOLDS),
        "These images are among those that the words were learned from; other images may keep more tokens.",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
