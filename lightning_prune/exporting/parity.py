"""Whether an exported model is the same model: its outputs against those of PyTorch in float32 with the same patch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.errors import DataError, ExportError
from lightning_prune.runtimes.converted import relative_errors

SHARE = 0.995
"""Share of the images that must be within the tolerance in float32."""
_NOISE = 1e-5  # of the largest value of an image: more than rounding changes, and far less than an image shows
_DRAWS = 8

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parity:
    """How far the outputs of an exported model agree with those of PyTorch in float32.

    Attributes:
        images: Number of images that were compared.
        max_relative_error: Largest relative error of an image: max |y - y_torch| / max |y_torch|.
        typical_relative_error: Its median over the images.
        tolerance: Relative error up to which an image agrees.
        over_tolerance: Number of images with a larger one.
        token_flips: How many of these are explained by tokens whose scores are equal up to rounding: PyTorch's own
            output changes by more than the tolerance when noise of 1e-5 of the largest pixel is added to the image. The
            kept tokens themselves are no outputs of an exported model, so they cannot be compared. None in lower
            precisions, whose errors are no rounding of float32.
        top1_agreement: Share of the images with the same class; None for a model without classes.
        min_agreement: The least that it may be, or, for a model without classes, the least share of the images within
            the tolerance; None in float32, which is judged by `over_tolerance` and `token_flips`.
    """

    images: int
    max_relative_error: float
    typical_relative_error: float
    tolerance: float
    over_tolerance: int
    token_flips: int | None
    top1_agreement: float | None
    min_agreement: float | None = None

    @property
    def figures(self) -> str:
        """Errors in words."""
        flips = "" if self.token_flips is None else f", {self.token_flips} of them by token flips"
        return (
            f"{self.over_tolerance} of {self.images} images are more than {self.tolerance:g} off (relative error; the "
            f"largest is {self.max_relative_error:.2g}){flips}"
        )


def compare_outputs(
    reference: Run,
    exported: Run,
    images: Tensor,
    batch_size: int,
    tolerance: float,
    classes: bool,
    min_agreement: float | None = None,
) -> Parity:
    """Compares the outputs of two forms of a model.

    Args:
        reference: The model in PyTorch: a function of (B, C, H, W) images.
        exported: The same of the exported model.
        images: (N, C, H, W).
        batch_size: B; the last batch is filled up with its first image.
        tolerance: See `Parity`.
        classes: Whether outputs are logits of classes.
        min_agreement: See `Parity`.

    Raises:
        DataError: If outputs of the model in PyTorch are not finite.
        ExportError: If outputs of the exported model are not finite, or have another shape.
    """
    expected = in_batches(reference, images, batch_size)
    found = in_batches(exported, images, batch_size)
    if not expected.isfinite().all():
        raise DataError("The outputs of `model` must be finite, got NaN or infinity for the calibration images.")
    if found.shape != expected.shape:
        raise ExportError(
            f"The exported model returns {tuple(found.shape)} where the model returns {tuple(expected.shape)}."
        )
    if not found.isfinite().all():
        raise ExportError("The exported model returns NaN or infinity where the model does not.")
    errors = relative_errors(expected, found)
    over = torch.nonzero(errors > tolerance).flatten().tolist()
    flips = None
    if min_agreement is None:
        flips = sum(is_flip(reference, images[index], expected[index], batch_size, tolerance) for index in over)
    agreement = float((expected.argmax(-1) == found.argmax(-1)).double().mean()) if classes else None
    largest, typical = float(errors.max()), float(errors.median())
    return Parity(len(images), largest, typical, tolerance, len(over), flips, agreement, min_agreement)


def check_parity(parity: Parity) -> None:
    """Raises ExportError, with the figures, unless the exported model counts as the same model.

    In float32, 99.5% of the images have to agree within the tolerance, and the others have to be token flips. In other
    precisions, `min_agreement` of the images need the same class; where there are no classes, an output within the
    tolerance.
    """
    n, over, least = parity.images, parity.over_tolerance, parity.min_agreement
    few = over <= (1 - (SHARE if least is None else least)) * n + 1e-9
    if least is None:
        if not few or parity.token_flips != over:
            raise ExportError(
                f"The exported model is not the model: {parity.figures}. At most {1 - SHARE:.1%} may be, all by token "
                "flips."
            )
    elif parity.top1_agreement is None:
        if not few:
            raise ExportError(
                f"The exported model is not the model: {parity.figures}. At most {1 - least:.1%} may be "
                "(`min_agreement`)."
            )
    elif parity.top1_agreement < least:
        figures = parity.figures
        raise ExportError(
            f"The exported model is not the model: it gives {parity.top1_agreement:.2%} of {n} images the same class; "
            f"at least {least:.1%} must be (`min_agreement`). {figures[0].upper()}{figures[1:]}."
        )


def in_batches(run: Run, images: Tensor, batch_size: int) -> Tensor:
    """The outputs (N, ...) for (N, C, H, W) images, run in batches of exactly `batch_size`."""
    outputs = []
    for batch in images.split(batch_size):
        missing = batch_size - len(batch)
        filled = torch.cat([batch, batch[:1].expand(missing, -1, -1, -1)]) if missing else batch
        outputs.append(run(filled)[: len(batch)])
    return torch.cat(outputs)


def is_flip(reference: Run, image: Tensor, expected: Tensor, batch_size: int, tolerance: float) -> bool:
    """Whether an image decides between tokens of equal score, so that rounding changes the output.

    Args:
        reference: The model in PyTorch.
        image: (C, H, W).
        expected: Its output.
        batch_size: Of the model.
        tolerance: Relative error from which on the output has changed.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_DRAWS, *image.shape, generator=generator) * _NOISE * image.abs().max()
    outputs = in_batches(reference, image + noise, batch_size)
    return bool((relative_errors(expected.expand_as(outputs), outputs) > tolerance).any())
