"""The images on which a runtime's quantizer finds the ranges of activations.

A runtime is named by its spec and holds no images. Whoever has some says so with `calibrating_with`, and every graph
that is quantized inside it uses them.
"""

import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from lightning_prune.runtimes.graph_export import ExportedGraph

CALIBRATION_IMAGES = 32
"""Images that a graph is calibrated on at most: each takes a forward pass or two for every graph."""

_images: ContextVar[Tensor | None] = ContextVar("calibration_images", default=None)


@contextmanager
def calibrating_with(images: Tensor | None) -> Iterator[None]:
    """A context in which graphs are quantized on these images.

    Args:
        images: (N, channels, height, width), as the model receives them; the first `CALIBRATION_IMAGES` are used. None
            changes nothing.

    Example:
        >>> import torch
        >>> from lightning_prune.runtimes.calibration import calibrating_with
        >>> with calibrating_with(torch.rand(32, 3, 224, 224)):
        ...     pass  # run the model in "onnxruntime:quantize=static" or "openvino:quantize=int8"
    """
    token = _images.set(_images.get() if images is None else images.detach())
    try:
        yield
    finally:
        _images.reset(token)


@contextmanager
def calibrating_if_none(images: Tensor) -> Iterator[None]:
    """A context in which graphs are quantized on these images, unless a `calibrating_with` around it gives others.

    Args:
        images: As of `calibrating_with`.
    """
    with calibrating_with(images if _images.get() is None else None):
        yield


def calibration_key() -> Hashable:
    """What tells the images of the innermost `calibrating_with` from others; None outside of it."""
    images = _images.get()
    return None if images is None else _Identity(images)


class _Identity:
    """Equal for tensors that are one memory in one state; holds it, so that no other tensor can take its place."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self._key = images.data_ptr(), images.shape, images.stride(), -1 if images.is_inference() else images._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def calibration_batches(graph: ExportedGraph, name: str) -> list[tuple[Tensor, ...]]:
    """Inputs to calibrate a graph on, in its own batch size; images repeat where they do not fill the last batch.

    The images do not depend on that batch size, so that graphs for two of them get the same ranges.

    Args:
        graph: The first of its inputs are the images; the others stay what they are in the example.
        name: The spec of the runtime, for a warning if there are no images of this size: then the example is used.
    """
    example, *others = graph.inputs
    images = _images.get()
    if images is None or images.shape[1:] != example.shape[1:]:
        missing = "no others were given" if images is None else "those that were given have another size"
        warnings.warn(
            f"{name} is calibrated on the {len(example)} images that it runs first, as {missing}. Its accuracy can be "
            "lower than with a few dozen real images, as `TokenPruning` and `lp.compare` take them from the dataset.",
            stacklevel=2,
        )
        images = example
    images = images[:CALIBRATION_IMAGES].to(example)
    batch = len(example)
    index = torch.arange(-(-len(images) // batch) * batch, device=example.device) % len(images)
    return [(each.contiguous(), *others) for each in images[index].split(batch)]
