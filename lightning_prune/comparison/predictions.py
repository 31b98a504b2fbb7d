"""The predicted class of every image of a validation, recorded without changing what the module does."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import RandomSampler
from torchmetrics import Metric

from lightning_prune._utils.sampler_shares import SamplerShare, shares_of
from lightning_prune._utils.trees import tree_leaves
from lightning_prune._utils.validation import is_int
from lightning_prune.callbacks.batches import Extract, images_from_batch, labels_from_batch
from lightning_prune.classification.grouped_batches import split_groups
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.comparison.output_capture import capture_outputs
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer, find_vision_transformer

_NONE = -1  # the label of an image that has none


class Predictions(NamedTuple):
    """Predicted and right class of each image of a run, in the order of the loader (one process after another).

    Attributes:
        predicted: Predicted class.
        labels: Right class; -1 where the batches hold none.
    """

    predicted: list[int]
    labels: list[int]

    @property
    def labelled(self) -> bool:
        """Whether the right classes are known."""
        return _NONE not in self.labels

    @property
    def correct(self) -> list[bool]:
        """Whether the predicted class of each image is the right one."""
        return [a == b for a, b in zip(self.predicted, self.labels, strict=True)]


class PredictionRecorder(L.Callback):
    """Records the predicted class of every image of a validation, whatever the LightningModule is.

    The logits are the output of the module's own `forward` where the step calls it once a batch, else the output of the
    Vision Transformer where that returns logits. Their columns must match the number of classes that the module or the
    transformer states, or the last linear layer after it. Otherwise (several calls in a step, features, a
    LightningModule compiled as a whole), or if the loader shuffles, nothing is recorded. Labels are unknown where one
    lies outside the columns, or a batch holds several tensors that may be the labels. Images that several processes
    repeat are left out, as in the accuracy.

    Args:
        module_path: Dotted path of the transformer, where there are several.
        extract: The images of a batch; see `lightning_prune.callbacks.TokenPruning`.

    Attributes:
        predictions: Of the last run; None where they are not known.
        missing: Why the predicted or the right classes of the last run are not known; empty where they are.
        images: Images of the first loader of the last run, of all processes.
        broken: Those of them, in the order of `predictions`, from whose output no best class follows: a NaN, or a
            largest value that is not finite. Not looked for where a LightningModule is compiled as a whole.
    """

    def __init__(self, module_path: str | None = None, extract: Extract | None = None) -> None:
        self.module_path, self.extract = module_path, extract
        self.predictions: Predictions | None = None
        self.images, self.missing = 0, ""
        self.broken: list[int] = []
        self._share: SamplerShare | None = None
        self._stop: list[Callable[[], None]] = []
        self._transformer: VisionTransformer | None = None
        self._columns: tuple[set[int], set[int]] = set(), set()  # by what the module states, and of its own head
        self._forget(None)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to record."""
        self._close()
        self._forget(shares_of(trainer)[0] if shares_of(trainer) else None)
        self._transformer = find_vision_transformer(pl_module, self.module_path)
        self._columns = _stated_classes(pl_module), _head_sizes(pl_module, self._transformer)
        if self._transformer.reader is not None and not self._transformer.reads_logits:
            self._known = False  # grids and maps have no classes, which is nothing to remark on
        elif getattr(pl_module, "_compiler_ctx", None) is not None:
            self._give_up("the LightningModule is compiled as a whole")
        elif shuffles(trainer):
            rank_zero_warn("The validation loader shuffles, so that images of two runs cannot be paired: no intervals.")
            self._give_up("the validation loader shuffles")
        if getattr(pl_module, "_compiler_ctx", None) is None:
            self._stop = [
                capture_outputs(pl_module, self._own.append),
                capture_outputs(self._transformer.compiled_root, self._inner.append),
            ]

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Forgets the outputs of the batch before."""
        self._own.clear()
        self._inner.clear()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Records the predictions for the images of the first loader."""
        if dataloader_idx:
            return
        try:
            images = images_from_batch(batch, self.extract)
        except ArgumentError:  # no reason to end the run; whoever needs the images says so
            self._give_up("no images are found in a batch")
            return
        count = len(images) if self._share is None else self._share.counted(batch_idx, len(images))
        self.images += count
        self._masks.append(self._broken_rows(len(images), pl_module.device)[:count])
        logits = self._logits(len(images)) if self._known else None
        if logits is None:
            return
        predicted = logits.argmax(dim=1)
        grouped = isinstance(pl_module, ImageClassifier) and pl_module.names_of_groups() is not None
        labels, missing = _labels(split_groups(batch).pair if grouped else batch, *logits.shape)
        self.missing = self.missing or missing
        labels = torch.full_like(predicted, _NONE) if labels is None else labels.to(predicted)
        self._batches.append(torch.stack([predicted, labels])[:, :count])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers the predictions of all processes."""
        numbers = torch.tensor([self.images, int(self._known)], device=pl_module.device)
        everywhere = _gathered(trainer, numbers)
        self.images = int(everywhere[:, 0].sum())
        room = int(everywhere[:, 0].max())
        self.broken = self._gathered_broken(trainer, room, pl_module.device)
        if not bool(everywhere[:, 1].all()) or not self.images:
            if self._known:
                self.missing = self.missing or "the classes of another process are not known"
            return
        own = torch.cat(self._batches, dim=1) if self._batches else numbers.new_zeros(2, 0)
        padded = torch.full((2, room), _NONE - 1, dtype=torch.int64, device=pl_module.device)
        padded[:, : own.shape[1]] = own
        together = _gathered(trainer, padded).transpose(0, 1).reshape(2, -1).cpu()
        predicted, labels = together[:, together[0] > _NONE - 1].tolist()
        self.predictions = Predictions(predicted, labels)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends recording."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends recording."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends recording, if nothing has before."""
        self._close()

    def _give_up(self, reason: str) -> None:
        self._known, self.missing = False, self.missing or reason

    def _forget(self, share: SamplerShare | None) -> None:
        self.predictions, self.images, self.missing, self.broken = None, 0, "", []
        self._masks: list[Tensor] = []  # of each batch, whether an output is broken
        self._own: list[Any] = []
        self._inner: list[Any] = []
        self._batches: list[Tensor] = []
        self._known = True
        self._share = share

    def _close(self) -> None:
        stops, self._stop = self._stop, []
        for stop in stops:
            stop()

    def _broken_rows(self, images: int, device: torch.device) -> Tensor:
        """(B,) which images have an output, of the module or of the transformer, without a largest finite value."""
        assert self._transformer is not None
        found = [getattr(output, "logits", output) for output in self._own]
        if self._transformer.reader is None or self._transformer.reads_logits:
            found += [_output(self._transformer, output) for output in self._inner]
        else:  # whole grids and maps: what is compared of them may be a sample
            found += tree_leaves(self._inner)
        broken = torch.zeros(images, dtype=torch.bool, device=device)
        for output in found:
            if isinstance(output, Tensor) and output.is_floating_point() and output.shape[:1] == (images,):
                rows = output.detach().reshape(images, -1)
                if rows.shape[1]:
                    broken |= ~rows.amax(dim=1).isfinite().to(device)  # NaN is larger than any number here
        return broken

    def _gathered_broken(self, trainer: L.Trainer, room: int, device: torch.device) -> list[int]:
        """The places of broken images, of all processes."""
        own = (
            torch.cat(self._masks).to(torch.int64) if self._masks else torch.zeros(0, dtype=torch.int64, device=device)
        )
        padded = torch.full((room,), -1, dtype=torch.int64, device=device)
        padded[: len(own)] = own
        together = _gathered(trainer, padded).reshape(-1).cpu()
        return together[together >= 0].nonzero().flatten().tolist()

    def _logits(self, images: int) -> Tensor | None:
        """The only output for this batch that is known to be logits; without one nothing more is recorded."""
        transformer = self._transformer
        assert transformer is not None
        calls = [len(self._own), len(self._inner)]
        inner = _output(transformer, self._inner[0]) if calls[1] == 1 else None
        own = getattr(self._own[0], "logits", self._own[0]) if calls[0] == 1 else inner
        found = [output for output in (own, inner) if output is not None and _is_table(output, images)]
        logits = next((output for output in found if self._fits(output, output is inner)), None)
        if logits is None and found:
            self._give_up(f"the {found[0].shape[1]} columns of the output are not known to be those of a head")
        elif logits is None:
            self._give_up("no output of the module or the transformer is one row of logits for each image")
        return logits

    def _fits(self, output: Tensor, is_transformers: bool) -> bool:
        """Whether the columns of an output are those of a head: features must not be taken for logits."""
        assert self._transformer is not None
        columns, classes = output.shape[1], self._transformer.num_classes
        stated, heads = self._columns
        if columns in stated or (is_transformers and columns == classes):
            return True
        if stated or columns == self._transformer.embed_dim:
            return False
        return bool(classes) if is_transformers else columns in heads


def _output(transformer: VisionTransformer, result: Any) -> Tensor | None:
    """Logits or features of what the transformer returned; None where the step asked it for something else."""
    try:
        return transformer.output(result)
    except (AssertionError, AttributeError, IndexError, RuntimeError, StopIteration, TypeError, UnsupportedModelError):
        return None


def _is_table(output: Any, images: int) -> bool:
    return isinstance(output, Tensor) and output.ndim == 2 and len(output) == images and output.shape[1] > 1


def _stated_classes(module: L.LightningModule) -> set[int]:
    """The numbers of classes that a module states: its attribute, its hyperparameters, those of its metrics."""
    found = [getattr(module, "num_classes", None), module.hparams.get("num_classes")]
    found += [getattr(metric, "num_classes", None) for metric in module.modules() if isinstance(metric, Metric)]
    return {int(number) for number in found if number is not None and is_int(number, 2)}


def _head_sizes(module: L.LightningModule, transformer: VisionTransformer) -> set[int]:
    """How many columns a head outside the transformer makes: its last linear layer, or a table of text embeddings."""
    inside = {id(tensor) for tensor in (*transformer.root.parameters(), *transformer.root.buffers())}
    weights = [each for each in module.parameters() if id(each) not in inside and each.ndim == 2]
    if weights:
        return {weights[-1].shape[0]}
    return {size for each in module.buffers() if id(each) not in inside and each.ndim == 2 for size in each.shape}


def _labels(batch: Any, images: int, columns: int) -> tuple[Tensor | None, str]:
    """The labels of a batch, or None and why they are not known."""
    if isinstance(batch, Sequence):
        integers = [
            each for each in batch[1:] if isinstance(each, Tensor) and each.ndim == 1 and not each.is_floating_point()
        ]
        if len(integers) > 1:
            return None, f"{len(integers)} tensors of integers in a batch may be the labels"
    labels = labels_from_batch(batch)
    if labels is None or len(labels) != images:
        return None, "no labels are found in a batch"
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= columns:
        return None, f"the labels reach from {low} to {high}, the head has {columns} classes"
    return labels, ""


def shuffles(trainer: L.Trainer) -> bool:
    """Whether the first loader yields its images in another order each time."""
    loaders = tree_leaves(getattr(trainer.val_dataloaders, "iterables", trainer.val_dataloaders))
    return bool(loaders) and isinstance(getattr(loaders[0], "sampler", None), RandomSampler)


def _gathered(trainer: L.Trainer, values: Tensor) -> Tensor:
    """The values of all processes, (processes, ...); of one where there is one."""
    return trainer.strategy.all_gather(values).reshape(-1, *values.shape)
