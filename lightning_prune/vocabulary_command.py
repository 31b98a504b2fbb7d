"""`lightning-prune vocabulary`: visual words from the images that a Trainer's loader yields."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.attached import attached_callbacks
from lightning_prune.callbacks.images import images_from_batch
from lightning_prune.comparison import writable
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.patches import patch_side
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling.latency import count_tokens, ready_to_run
from lightning_prune.reduction import tokens_per_image
from lightning_prune.vocabulary import Vocabulary
from lightning_prune.vocabulary_learning import WordLearner

_SHOWN = 64  # of the images that were learned from, how many have their tokens counted for the report
_THRESHOLDS = (0.1, 0.2)


def learn_words(
    trainer: L.Trainer,
    model: L.LightningModule,
    pruner: TokenPruning,
    output: str,
    words: int,
    limit: int | None,
    seed: int,
    **data: Any,
) -> Vocabulary:
    """Streams the prediction loader past k-means, saves the vocabulary and says how long images would be.

    The module's own steps do not run, but its hooks do, so that the images are those that its transformer sees.

    Args:
        trainer: Whose prediction loop runs, in one process.
        model: Contains the Vision Transformer; it has its patch size, and perhaps a `data_config` with mean and std.
        pruner: Says which transformer, and where the images of a batch are; prunes nothing meanwhile.
        output: The file, `.safetensors`.
        words: How many.
        limit: How many images to learn from; None for all.
        seed: Of k-means.
        data: `datamodule` or `dataloaders`, as `Trainer.predict` takes them.

    Raises:
        ArgumentError: If an argument is unusable, or there are more words than patches.
        DataError: If there are no images.
    """
    if Path(output).suffix != ".safetensors":
        raise ArgumentError(f"`output` must be a file that ends in .safetensors, got {output!r}.")
    if limit is not None and limit < 1:
        raise ArgumentError(f"`limit` must be a number of images >= 1, got {limit}.")
    if trainer.world_size > 1:
        raise ArgumentError(f"Words are learned in one process; got {trainer.world_size}. Give --trainer.devices 1.")
    writable(Path(output).absolute().parent)
    reader = _Reader(pruner, words, limit, seed)
    callbacks, enabled = attached_callbacks(trainer), pruner.enabled
    callbacks.append(reader)
    pruner.enabled = False
    vars(model)["predict_step"] = _no_step
    try:
        trainer.predict(model, return_predictions=False, **data)
    finally:
        del vars(model)["predict_step"]
        pruner.enabled = enabled
        callbacks.remove(reader)
    if reader.learner is None:
        raise DataError("The prediction loader yielded no batch to learn words from.")
    with Console(stderr=True).status(f"Learning the last of {words} words"):
        vocabulary = reader.learner.finish(*_normalisation(model, pruner.target, reader.last.shape[1]))
    path = vocabulary.save(output)
    _report(Console(markup=False), vocabulary, reader, path)
    return vocabulary


class _Reader(L.Callback):
    """Learns from every batch of a prediction run, and ends the run when it has enough."""

    def __init__(self, pruner: TokenPruning, words: int, limit: int | None, seed: int) -> None:
        self.pruner, self.words, self.limit, self.seed = pruner, words, limit, seed
        self.learner: WordLearner | None = None
        self.last = torch.empty(0)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        images = images_from_batch(batch, self.pruner.images_from_batch)
        if self.learner is None:
            with trainer.precision_plugin.forward_context():
                self.learner = WordLearner(_patch_size(pl_module, images, self.pruner.target), self.words, self.seed)
        left = len(images) if self.limit is None else self.limit - self.learner.images
        images = images[:left].detach().cpu().float()
        self.learner.add(images)
        same = self.last.shape[1:] == images.shape[1:]
        self.last = torch.cat((self.last, images))[-_SHOWN:] if same else images[-_SHOWN:]
        if self.learner.images == self.limit:
            raise StopIteration  # which is how Lightning's loop is told that there is no more


def _no_step(*args: Any, **kwargs: Any) -> tuple[()]:
    return ()


def _patch_size(module: L.LightningModule, images: Tensor, target: str | None) -> int:
    """The side of the transformer's patches, by how many tokens it makes of an image."""
    transformer = find_vision_transformer(module, target)
    with ready_to_run(transformer):
        patches = count_tokens(transformer, images[:1]) - transformer.prefix_tokens
    return patch_side(images.shape[2], images.shape[3], patches)


def _normalisation(module: L.LightningModule, target: str | None, channels: int) -> tuple[Any, Any]:
    """Mean and std of each channel, of the module's data config or its transformer's; None where neither says.

    Nor do they say it of a model for other channels than those of the weights that timm's config is about.
    """
    transformer: Any = find_vision_transformer(module, target).root
    config = getattr(module, "data_config", None) or getattr(transformer, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    return (mean, std) if mean is not None and std is not None and len(mean) == len(std) == channels else (None, None)


def _report(console: Console, vocabulary: Vocabulary, reader: _Reader, path: Path) -> None:
    say: Callable[[str], None] = lambda text: console.print(text, soft_wrap=True, highlight=False)  # noqa: E731
    images = reader.learner.images if reader.learner else 0
    side = vocabulary.patch_size
    say(f"{len(vocabulary)} words for patches of {vocabulary.channels} x {side} x {side}, learned from {images} images")
    for threshold in _THRESHOLDS:
        say(f"threshold {threshold}: {tokens_per_image([reader.last], vocabulary, threshold)}")
    say("The words were learned from these images among others; images that they were not learned from may keep more.")
    say(f"Written: {path}")
