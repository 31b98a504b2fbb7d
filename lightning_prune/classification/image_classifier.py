"""The LightningModule around an image classifier: accuracy, throughput and latency of a validation."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_prune._utils.validation import check, check_bool, check_int, check_path
from lightning_prune.classification.checkpoints import load_weights
from lightning_prune.classification.evaluation import Evaluation, check_batch, split_batch
from lightning_prune.classification.grouped_batches import GroupReport, names_of_groups, split_groups
from lightning_prune.classification.hugging_face import is_hugging_face
from lightning_prune.classification.named_models import create_model
from lightning_prune.classification.preprocessing import data_config_of
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.runtimes import TorchCompile, TorchEager, parse_runtime
from lightning_prune.runtimes.in_place import force_eager
from lightning_prune.runtimes.torch_runtime import Compiled


class ImageClassifier(L.LightningModule):
    """Validates, tests and predicts with an image classifier, and measures its speed.

    Batches are `(images, labels)`: images `(B, C, H, W)`, labels `(B,)`. It logs under `val/` and `test/`, over all
    dataloaders of the run together:

    - `loss` (cross-entropy), `top1`, and `top5` if there are more than 5 classes;
    - `throughput`: images per second in the forward pass, without loading and transfer;
    - `throughput_end_to_end`: images per second from the end of one batch to the end of the next;
    - `latency_p50`, `latency_p90`: milliseconds per batch in the forward pass;
    - `group_NAME` of each group, `worst_group` and `worst_group_images` (the accuracy of the worst group, and how many
      images it has) where a dataset has `group_names`, as that of `ImageTableData`, and its batches say the group of
      each image: mappings with `image`, `label` and `group`, or (images, labels, groups);
    - `joules_per_image`, `watts`: for the whole loop, including the idle power of the device. Only if the device has
      an energy counter (`lightning_prune.profiling.find_counter`) and the run lasts a second or more after warm-up.

    The device is synchronised before and after each timed pass. Warm-up batches and batches of an unusual size
    are left out of the times. Images that a DistributedSampler repeats, so that all processes get the same number, are
    left out of loss and accuracy. The callback `TokenPruning` works with any LightningModule; use this class if you
    have none. For training, subclass it and add `configure_optimizers`.

    Args:
        model: Name of a timm model; `hf:` with a folder or a name of Hugging Face; the import path of a class or
            function, or a mapping with `class_path` and `init_args`; or a module that returns logits `(B, num_classes)`
            or an output with `logits`. With a model that returns features, such as a tower, accuracy is not measured.
        pretrained: Whether the weights for that name are loaded. Ignored if `weights` is given.
        weights: Weights for the model: `.safetensors`, `.pth`, a Lightning checkpoint, or a folder that
            `save_pretrained` of Hugging Face wrote; read without pickle.
        num_classes: Size of the head; by default the model's own. If it differs from that of timm's weights, the head
            is initialised at random.
        runtime: `"torch"`, or `"torch.compile"`, also with a mode (`"torch.compile:mode=reduce-overhead"` for CUDA
            graphs, `"torch.compile:mode=blocks"` to compile each block separately). Each batch size is compiled
            separately; batches smaller than the first one of a run run eagerly.
        model_kwargs: Further arguments of the model.
        warmup: Number of batches at the start that are left out of the times; at least one batch is always counted.

    Raises:
        ArgumentError: If an argument is invalid. For an unknown model name, similar names are listed.
        FileFormatError: If the weights file cannot be read.
        WeightsError: If the weights do not fit the model, or timm cannot load them.

    Example:
        >>> import lightning as L
        >>> from lightning_prune import DigitsData, ImageClassifier
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, limit_val_batches=2)
        >>> module = ImageClassifier("vit_digits_patch4_56")
        >>> (found,) = trainer.validate(module, DigitsData(), verbose=False)
        >>> found["val/top1"] > 0.8
        True
    """

    def __init__(
        self,
        model: str | nn.Module | dict[str, Any] = "deit_small_patch16_224",
        pretrained: bool = True,
        weights: str | None = None,
        num_classes: int | None = None,
        runtime: str = "torch",
        model_kwargs: dict[str, Any] | None = None,
        warmup: int = 2,
    ) -> None:
        super().__init__()
        if num_classes is not None:
            check_int("num_classes", num_classes, 1)
        check_int("warmup", warmup, 0, "a number of batches")
        check_bool("pretrained", pretrained)
        check("model", model, "a name or a module", isinstance(model, str | dict | nn.Module))
        check("model_kwargs", model_kwargs, "a dict or None", model_kwargs is None or isinstance(model_kwargs, dict))
        if weights is not None:
            check_path("weights", weights)
        parsed = parse_runtime(runtime)
        if not isinstance(parsed, TorchEager | TorchCompile):
            raise ArgumentError(f"`runtime` must be 'torch' or 'torch.compile', got {runtime!r}.")
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else None)
        if not isinstance(model, nn.Module):
            model = create_model(model, pretrained and weights is None, num_classes, model_kwargs or {}, weights)
        elif model_kwargs:
            raise ArgumentError(f"`model_kwargs` must be None if `model` is a module, got {model_kwargs!r}.")
        if weights is not None:
            load_weights(model, weights)
        self.model = model
        self.num_classes = num_classes or _head_size(model)
        if isinstance(parsed, TorchCompile):  # in place, which keeps the keys of the state_dict
            blocks = list(find_vision_transformer(model).blocks) if parsed.mode == "blocks" else None
            Compiled(model, parsed.mode, blocks)
        self._compiled, self._batch_size = parsed.compiles, 0
        self.evaluation = Evaluation(self.num_classes, warmup)
        self.group_names: tuple[str, ...] | None = None  # those of the datasets
        self.groups: GroupReport | None = None
        self._loaders_with_groups: list[bool] = []

    @property
    def data_config(self) -> dict[str, Any] | None:
        """How images are prepared, as timm's data config: input_size, mean, std, interpolation, crop_pct.

        The size is that of the model as it is, also if it was made for another one than its name says. Mean and std
        are missing if a model of Hugging Face comes without an image processor. None for a module of your own.
        """
        return data_config_of(self.model)

    def forward(self, images: Tensor) -> Any:
        """Classifies images.

        Args:
            images: `(B, C, H, W)`, normalised as the model expects.

        Returns:
            Logits, `(B, num_classes)`; of a model without a head, features `(B, D)`; of a dense model, what it returns.
        """
        output = self.model(images)
        if isinstance(output, Tensor | list | tuple) or "feature_maps" in output:
            return output
        # Hugging Face's models return an output with several fields, and some may be None.
        fields = (getattr(output, name, None) for name in ("logits", "image_embeds", "pooler_output"))
        found: Tensor | None = next((value for value in fields if value is not None), None)
        return found if found is not None else output.last_hidden_state[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the cross-entropy of a batch and logs it as `train/loss`."""
        where = f"training batch {batch_idx}"
        images, labels = split_batch(batch, where)
        logits = self(images)
        if self.num_classes is None:
            raise ArgumentError(f"`model` must have a head to be trained, got {type(self.model).__name__} without.")
        check_batch(logits, labels, self.num_classes, where, finite=False)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Returns the logits of a batch, `(B, num_classes)`; labels and groups in the batch are ignored."""
        pair, _ = split_groups(batch)
        images = pair[0] if isinstance(pair, list | tuple) else pair
        with self._eagerly_if_short(images, batch_idx):
            logits: Tensor = self(images)
        return logits

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures a batch."""
        self._evaluate(batch, "validation", batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures a batch."""
        self._evaluate(batch, "test", batch_idx, dataloader_idx)

    def _evaluate(self, batch: Any, stage: str, batch_idx: int, dataloader_idx: int) -> None:
        where = f"{stage} batch {batch_idx}"
        grouped = self.groups is not None and self._has_groups(dataloader_idx)
        pair, groups = split_groups(batch) if grouped or isinstance(batch, Mapping) else (batch, None)
        images, labels = split_batch(pair, where)
        with self._eagerly_if_short(images, batch_idx), self.evaluation.timing(images):
            logits = self(images)
        if self.num_classes is not None:
            check_batch(logits, labels, self.num_classes, where, finite=self.evaluation.refuses_broken)
            self.evaluation.update(logits, labels, batch_idx, dataloader_idx)
            if self.groups is not None and grouped:
                count = self.evaluation.counted(len(labels), batch_idx, dataloader_idx)
                self.groups.update(logits, labels, groups, count, where)

    def names_of_groups(self) -> tuple[str, ...] | None:
        """The groups whose accuracy is reported: those of this module, else of a dataset of the loop; None without."""
        return self.group_names or next((names for names in self._groups_of_loaders() if names), None)

    def _groups_of_loaders(self) -> list[tuple[str, ...] | None]:
        try:
            trainer = self.trainer
        except RuntimeError:  # none runs it
            return []
        return names_of_groups(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)

    def _has_groups(self, dataloader_idx: int) -> bool:
        """Whether the images of a loader are in the groups that are reported."""
        return bool(self.group_names) or self._loaders_with_groups[dataloader_idx]

    def _eagerly_if_short(self, images: Any, batch_idx: int) -> AbstractContextManager[Any]:
        """Runs a batch eagerly if it is smaller than the first, because compiling for a single batch takes seconds."""
        if not self._compiled:
            return nullcontext()
        self._batch_size = len(images) if batch_idx == 0 else self._batch_size
        return force_eager() if len(images) < self._batch_size else nullcontext()

    def _log_evaluation(self, stage: str) -> None:
        for name, metric in self.evaluation.finish().items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "top1")
        for name, figure in ({} if self.groups is None else self.groups.compute()).items():
            self.log(f"{stage}/{name}", figure)

    def on_validation_epoch_start(self) -> None:
        """Resets all metrics, so that sanity checks and aborted runs are not counted."""
        self.evaluation.reset(self.trainer)
        names = self.names_of_groups()
        self._loaders_with_groups = [each is not None and each == names for each in self._groups_of_loaders()]
        if self.groups is None or self.groups.names != names:
            self.groups = None if names is None else GroupReport(names).to(self.device)
        elif names is not None:
            self.groups.reset()

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Starts the end-to-end clock after the callbacks, so that their work before the first batch is not counted."""
        self.evaluation.timer.start()

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stops the end-to-end clock of this batch."""
        self.evaluation.timer.stop()

    def on_validation_epoch_end(self) -> None:
        """Logs everything under `val/`."""
        self._log_evaluation("val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self) -> None:
        """Logs everything under `test/`."""
        self._log_evaluation("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the checkpoint self-contained: loading it needs neither timm's weights nor the weights file."""
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] |= {"pretrained": False, "weights": None}


def _head_size(model: nn.Module) -> int | None:
    """The number of classes that a model has; None if it returns features."""
    size = getattr(model, "num_classes", getattr(model, "num_labels", None))  # `num_labels` in Hugging Face's models
    if size == 0 or (size is None and is_hugging_face(model)):
        return None
    if not isinstance(size, int) or size < 1:
        raise ArgumentError(
            f"`num_classes` must be given for a {type(model).__name__}, which has no number of classes, got {size!r}."
        )
    return size
