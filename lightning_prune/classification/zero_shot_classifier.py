"""Zero-shot classification as a LightningModule, with the accuracy of the worst group."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_prune._utils.validation import check
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.classification.zero_shot_model import TEMPLATES, Tokenizer, zero_shot
from lightning_prune.errors import DataError
from lightning_prune.metrics import GroupAccuracy


class ZeroShotClassifier(ImageClassifier):
    """Classifies images by the names of their classes, with CLIP or SigLIP; no training.

    Text features are computed once. The image tower is what is pruned and measured, and logits, accuracy and all that
    `ImageClassifier` logs are those of the similarities. Where a batch says the group of each image, `val/worst_group`
    is the accuracy of the worst group, and `val/group_NAME` that of each: batches are mappings with `image`, `label`
    and `group`, or (images, labels, groups).

    Args:
        model: `hf:` and a folder or a name of a CLIP or SigLIP model of Hugging Face, `openclip:NAME/WEIGHTS` of
            OpenCLIP, or such a model.
        class_names: What the classes are called, in the order of the labels.
        templates: Prompts with `{}` for the name of a class.
        tokenizer: As of `lightning_prune.classification.zero_shot`.
        group_names: What the groups are called, in the order of their numbers in a batch; None where there are none.
        warmup: Number of batches at the start that are left out of the times.

    Raises:
        ArgumentError, UnsupportedModelError, WeightsError: As `zero_shot`.
        DataError: In a run, if groups were named and a batch has none, or numbers that are no groups.

    Example:
        >>> from lightning_prune import ZeroShotClassifier
        >>> names, prompts = ["landbird", "waterbird"], ["a photo of a {}."]
        >>> # module = ZeroShotClassifier("hf:openai/clip-vit-base-patch16", names, prompts)
    """

    def __init__(
        self,
        model: str | nn.Module,
        class_names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        tokenizer: Tokenizer | None = None,
        group_names: Sequence[str] | None = None,
        warmup: int = 2,
    ) -> None:
        names = list(group_names) if isinstance(group_names, Sequence) and not isinstance(group_names, str) else []
        usable = bool(names) and all(isinstance(name, str) and name for name in names)
        check("group_names", group_names, "a list of names or None", group_names is None or usable)
        super().__init__(zero_shot(model, class_names, templates, tokenizer), warmup=warmup)
        self.class_names = tuple(class_names)
        self.group_names = None if group_names is None else tuple(names)
        self.groups = None if group_names is None else GroupAccuracy(len(names))

    def on_validation_epoch_start(self) -> None:
        """Resets all metrics."""
        super().on_validation_epoch_start()
        if self.groups is not None:
            self.groups.reset()

    on_test_epoch_start = on_validation_epoch_start

    def _evaluate(self, batch: Any, stage: str, batch_idx: int, dataloader_idx: int) -> Any:
        where = f"{stage} batch {batch_idx}"
        pair, groups = _split_groups(batch)
        if self.groups is not None and groups is None:
            raise DataError(
                f"{where.capitalize()} must have groups, as `group_names` were given: a mapping with `image`, `label` "
                "and `group`, or (images, labels, groups)."
            )
        if self.groups is None or groups is None:
            return super()._evaluate(pair, stage, batch_idx, dataloader_idx)
        if not isinstance(groups, Tensor) or groups.ndim != 1 or groups.is_floating_point():
            got = tuple(groups.shape) if isinstance(groups, Tensor) else type(groups).__name__
            raise DataError(f"Groups of {where} must be integers (B,), got {got}.")
        logits = super()._evaluate(pair, stage, batch_idx, dataloader_idx)
        share = self.evaluation.shares[dataloader_idx] if dataloader_idx < len(self.evaluation.shares) else None
        count = len(groups) if share is None else share.counted(batch_idx, len(groups))
        labels = pair[1]
        if groups.shape != labels.shape:
            raise DataError(f"Groups of {where} must be integers {tuple(labels.shape)}, got {tuple(groups.shape)}.")
        if count:
            self.groups.update((logits.argmax(dim=1) == labels)[:count], groups[:count])
        return logits

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Returns the logits of a batch, `(B, classes)`; labels and groups in the batch are ignored."""
        return super().predict_step(_split_groups(batch)[0], batch_idx, dataloader_idx)

    def _log_evaluation(self, stage: str) -> None:
        super()._log_evaluation(stage)
        if self.groups is None or self.group_names is None:
            return
        found = self.groups.compute()
        for name, accuracy in zip(self.group_names, found, strict=True):
            self.log(f"{stage}/group_{name}", accuracy)
        known = found[~found.isnan()]
        if len(known):
            self.log(f"{stage}/worst_group", known.min())


def _split_groups(batch: Any) -> tuple[Any, Tensor | None]:
    """(images, labels) and the groups of a batch; None where it has none."""
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in ("image", "images", "pixel_values") if key in batch), None)
        labels = next((batch[key] for key in ("label", "labels") if key in batch), None)
        return [images, labels], batch.get("group", batch.get("groups"))
    if isinstance(batch, list | tuple) and len(batch) == 3:
        return list(batch[:2]), batch[2]
    return batch, None
