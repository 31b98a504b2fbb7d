"""Cheap estimates of accuracy: how far the outputs of the pruned model agree with those of the dense model."""

from collections.abc import Callable
from math import inf, isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune._utils.progress import note_progress
from lightning_prune.errors import ArgumentError, DataError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer
from lightning_prune.profiling.output_kinds import OUTPUT_KINDS, choose_proxy
from lightning_prune.runtimes.in_place import force_eager


def top1(labels: Tensor, logits: Tensor) -> float:
    """Share of images whose highest logit is at their label: A(n) in the POMT paper."""
    return float((logits.argmax(dim=-1) == labels).float().mean())


Z95 = 1.96
GROUPS = 20  # of images, each left out in turn: enough for a standard error, and far cheaper than every image in turn


class Estimate(NamedTuple):
    """A value that was measured on some images, and how far it would vary with other images of the same kind.

    Attributes:
        value: 1 is as good as dense.
        stderr: Standard error of the value; infinite where the images are too few to say.
    """

    value: float
    stderr: float = inf

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval by the normal distribution; None where the standard error is not known."""
        return (self.value - Z95 * self.stderr, self.value + Z95 * self.stderr) if isfinite(self.stderr) else None

    def __str__(self) -> str:
        """In percent of dense, with the interval."""
        if self.interval is None:
            return f"{self.value:.2%}"
        low, high = self.interval
        return f"{self.value:.2%} (95% interval {100 * low:.2f} to {high:.2%})"


DENSE_ACCURACY = Estimate(1.0, 0.0)


def jackknife(agreement: Callable[[Tensor, Tensor], float], reference: Tensor, outputs: Tensor) -> Estimate:
    """An agreement with its standard error by the delete-a-group jackknife.

    Groups of images are left out in turn. With g groups, the variance of the value is (g - 1) / g times the sum of the
    squared distances of the g values from their mean. The agreement may be any smooth function of the images, such as
    a ratio of means.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 11.

    Args:
        agreement: (reference, outputs) -> the value.
        reference: (B, ...) what the outputs are compared with, such as those of the dense model.
        outputs: (B, ...) outputs for the same images, which are in no particular order.

    Example:
        >>> import torch
        >>> from lightning_prune.profiling.accuracy_proxy import jackknife
        >>> outputs = torch.randn(400, generator=torch.Generator().manual_seed(0))
        >>> estimate = jackknife(lambda dense, pruned: float((pruned - dense).mean()), torch.zeros(400), outputs)
        >>> round(estimate.stderr, 2)  # of the mean of 400 normal numbers
        0.05
    """
    value, images = agreement(reference, outputs), len(outputs)
    groups = min(GROUPS, images)
    if groups < 2:
        return Estimate(value)
    group = torch.arange(images) % groups
    try:
        values = [agreement(reference[group != left], outputs[group != left]) for left in range(groups)]
    except DataError:  # without these images, nothing can be said
        return Estimate(value)
    mean = sum(values) / groups
    return Estimate(value, sqrt((groups - 1) / groups * sum((each - mean) ** 2 for each in values)))


def relative_accuracy(dense: Tensor, pruned: Tensor) -> float:
    """Top-1 accuracy of the pruned model over that of the dense model.

    Args:
        dense: (B,) whether the dense model classifies each image correctly.
        pruned: (B,) whether the pruned model does.

    Raises:
        DataError: If the dense model classifies none correctly.
    """
    if not dense.any():
        raise DataError("The dense model classifies no labelled image correctly; check labels and weights.")
    return float(pruned.double().mean() / dense.double().mean())


class Proxy:
    """An estimate of accuracy that runs the model in its present, patched or dense, state.

    Create it while the model is dense: its outputs at that moment are the reference.

    Args:
        transformer: The Vision Transformer.
        images: (B, C, H, W); moved to the device batch by batch.
        device: Device of the transformer.
        batch_size: Images in one forward pass.
        labels: (B,) int64. With labels the proxy is top-1 accuracy relative to dense.
        on_step: Called after every batch.
        proxy: What is estimated without labels; see `lightning_prune.profiling.output_kinds.choose_proxy`.

    Attributes:
        name: What the values mean.

    Raises:
        ArgumentError: If there are no images, or another number of labels.
        DataError: If a label is out of range, or the outputs are not finite.
        UnsupportedModelError: If the model returns a vector for each token.
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        images: Tensor,
        device: torch.device,
        batch_size: int,
        labels: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
        proxy: str = "auto",
    ) -> None:
        if images.ndim != 4 or not len(images):
            raise ArgumentError(f"`images` must be (B, C, H, W), got {tuple(images.shape)}.")
        self._transformer, self._images, self._device = transformer, images, device
        self._batch_size, self._on_step = batch_size, on_step
        self._labels = None if labels is None else labels.cpu()
        weight = next((p for p in transformer.root.parameters() if p.is_floating_point()), images)
        self._dtype = images.dtype if torch.is_autocast_enabled(device.type) else weight.dtype
        self._kind = OUTPUT_KINDS[choose_proxy(transformer.root, transformer, proxy)]
        self._dense = self._outputs()
        self.name = self._choose(labels)

    def _choose(self, labels: Tensor | None) -> str:
        num_classes = self._transformer.num_classes
        if labels is None:
            self._kind.agreement(self._dense, self._dense)  # raises where the outputs say nothing
            return self._kind.label
        if not num_classes:
            raise ArgumentError("`labels` must be None for a model that returns features, got labels.")
        if len(labels) != len(self._images):
            raise ArgumentError(f"`labels` must be one for each of {len(self._images)} images, got {len(labels)}.")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise DataError(f"Label {wrong} is out of range: the model's head has {num_classes} classes.")
        is_right = self._dense.argmax(-1).eq(labels.cpu())
        relative_accuracy(is_right, is_right)  # raises where none is right
        return "top-1 accuracy relative to dense"

    @property
    def dense(self) -> Tensor:
        """(images, K) outputs of the dense model."""
        return self._dense

    def measure(self) -> Estimate:
        """The value for the present state of the model; 1 for dense."""
        outputs = self._outputs()
        if self._labels is None:
            return jackknife(self._kind.agreement, self._dense, outputs)
        dense, pruned = (logits.argmax(-1).eq(self._labels) for logits in (self._dense, outputs))
        return jackknife(relative_accuracy, dense, pruned)

    def _outputs(self) -> Tensor:
        collected = []
        with torch.no_grad(), force_eager():  # compiling would not change the outputs and takes longer than one pass
            for images in self._images.split(self._batch_size):
                images = images.to(self._device, self._dtype)
                collected.append(self._transformer.outputs(images).float().cpu())
                note_progress(f"{sum(map(len, collected))} of {len(self._images)} images")
                self._on_step()
        outputs = torch.cat(collected)
        if outputs.ndim != 2:
            raise UnsupportedModelError(
                f"The transformer must return one vector per image, got outputs of shape {tuple(outputs.shape)}."
            )
        if not outputs.isfinite().all():
            bad = int((~outputs.flatten(1).isfinite().all(dim=1)).sum())
            raise DataError(f"The model's outputs are not finite for {bad} of {len(outputs)} calibration images.")
        return outputs
