"""Cheap estimates of accuracy: how far the outputs of the pruned model agree with those of the dense model."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.errors import ArgumentError, DataError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer
from lightning_prune.profiling.output_kinds import OUTPUT_KINDS, choose_proxy
from lightning_prune.runtimes.torch_runtime import force_eager


def top1(labels: Tensor, logits: Tensor) -> float:
    """Share of images whose highest logit is at their label: A(n) in the POMT paper."""
    return float((logits.argmax(dim=-1) == labels).float().mean())


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
        if top1(labels, self._dense) == 0:
            raise DataError("The dense model classifies no labelled image correctly; check labels and weights.")
        return "top-1 accuracy relative to dense"

    def measure(self) -> float:
        """The value for the present state of the model; 1 for dense."""
        outputs = self._outputs()
        if self._labels is not None:
            return top1(self._labels, outputs) / top1(self._labels, self._dense)
        return self._kind.agreement(self._dense, outputs)

    def _outputs(self) -> Tensor:
        collected = []
        with torch.no_grad(), force_eager():  # compiling would not change the outputs and takes longer than one pass
            for images in self._images.split(self._batch_size):
                images = images.to(self._device, self._dtype)
                collected.append(self._transformer.outputs(images).float().cpu())
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
