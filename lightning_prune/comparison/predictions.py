"""The predicted class of every image of a validation, recorded without changing what the module does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from lightning_prune._utils.sampler_shares import SamplerShare, shares_of
from lightning_prune._utils.trees import tree_leaves
from lightning_prune.callbacks.batches import Extract, images_from_batch, labels_from_batch
from lightning_prune.errors import ArgumentError
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
    Vision Transformer where that returns logits. Otherwise (several calls in a step, features, a LightningModule
    compiled as a whole), or if the loader shuffles, nothing is recorded. Images that several processes repeat are left
    out, as in the accuracy.

    Args:
        module_path: Dotted path of the transformer, where there are several.
        extract: The images of a batch; see `lightning_prune.callbacks.TokenPruning`.

    Attributes:
        predictions: Of the last run; None where they are not known.
        images: Images of the first loader of the last run, of all processes.
    """

    def __init__(self, module_path: str | None = None, extract: Extract | None = None) -> None:
        self.module_path, self.extract = module_path, extract
        self.predictions: Predictions | None = None
        self.images = 0
        self._stop: list[Callable[[], None]] = []
        self._transformer: VisionTransformer | None = None
        self._forget(None)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to record."""
        self._close()
        self._forget(shares_of(trainer)[0] if shares_of(trainer) else None)
        self._transformer = find_vision_transformer(pl_module, self.module_path)
        self._known = getattr(pl_module, "_compiler_ctx", None) is None
        if self._known and _shuffled(trainer):
            rank_zero_warn("The validation loader shuffles, so that images of two runs cannot be paired: no intervals.")
            self._known = False
        if self._known:
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
            self._known = False
            return
        count = len(images) if self._share is None else self._share.counted(batch_idx, len(images))
        self.images += count
        logits = self._logits(len(images)) if self._known else None
        if logits is None:
            self._known = False
            return
        labels = labels_from_batch(batch)
        predicted = logits.argmax(dim=1)
        if labels is None or len(labels) != len(predicted):
            labels = torch.full_like(predicted, _NONE)
        self._batches.append(torch.stack([predicted, labels.to(predicted)])[:, :count])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers the predictions of all processes."""
        numbers = torch.tensor([self.images, int(self._known)], device=pl_module.device)
        everywhere = _gathered(trainer, numbers)
        self.images = int(everywhere[:, 0].sum())
        if not bool(everywhere[:, 1].all()) or not self.images:
            return
        own = torch.cat(self._batches, dim=1) if self._batches else numbers.new_zeros(2, 0)
        room = int(everywhere[:, 0].max())
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

    def _forget(self, share: SamplerShare | None) -> None:
        self.predictions, self.images = None, 0
        self._own: list[Any] = []
        self._inner: list[Any] = []
        self._batches: list[Tensor] = []
        self._known = True
        self._share = share

    def _close(self) -> None:
        stops, self._stop = self._stop, []
        for stop in stops:
            stop()

    def _logits(self, images: int) -> Tensor | None:
        """The only output for this batch that looks like logits."""
        if len(self._own) == 1:
            output = getattr(self._own[0], "logits", self._own[0])
            if _are_logits(output, images):
                return output
        if self._transformer is not None and self._transformer.num_classes and len(self._inner) == 1:
            output = self._transformer.adapter.output(self._inner[0])
            if _are_logits(output, images):
                return output
        return None


def capture_outputs(module: nn.Module, receive: Callable[[Any], None]) -> Callable[[], None]:
    """Calls `receive` with every output of a module, also where that was compiled in place; returns what ends it."""
    compiled = vars(module).get("_compiled_call_impl")
    if compiled is None:
        return module.register_forward_hook(lambda _, __, output: receive(output)).remove

    def call(*args: Any, **kwargs: Any) -> Any:  # a hook would become part of the graph, or be skipped by it
        output = compiled(*args, **kwargs)
        receive(output)
        return output

    vars(module)["_compiled_call_impl"] = call

    def stop() -> None:
        vars(module)["_compiled_call_impl"] = compiled

    return stop


def _are_logits(output: Any, images: int) -> bool:
    return isinstance(output, Tensor) and output.ndim == 2 and len(output) == images and output.shape[1] > 1


def _shuffled(trainer: L.Trainer) -> bool:
    """Whether the first loader yields its images in another order each time."""
    loaders = tree_leaves(getattr(trainer.val_dataloaders, "iterables", trainer.val_dataloaders))
    return bool(loaders) and isinstance(getattr(loaders[0], "sampler", None), RandomSampler)


def _gathered(trainer: L.Trainer, values: Tensor) -> Tensor:
    """The values of all processes, (processes, ...); of one where there is one."""
    return trainer.strategy.all_gather(values).reshape(-1, *values.shape)
