"""What an exported model takes: normalised images, or images in 8 bits, which it scales and normalises itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune._utils.validation import check
from lightning_prune.errors import ArgumentError

InputForm = Literal["float32", "uint8"]

_LEVELS = 255
EXACT = 0.01
"""Levels by which an image in 8 bits is off at most after it was normalised and back; float32 gives 1e-4."""


@dataclass(frozen=True)
class ImageInput:
    """The images that an exported model takes.

    Attributes:
        form: `"float32"` for normalised images, `"uint8"` for images of 0 to 255.
        mean: Of each channel, in [0, 1], or one for all; None where the model does not normalise.
        std: Likewise.
    """

    form: InputForm = "float32"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def decoded(self, images: Tensor) -> Tensor:
        """Normalised (B, C, H, W) float32 images, from those that the exported model takes."""
        if self.form == "float32":
            return images.float()
        return ((images.double() / _LEVELS - self._channels(self.mean)) / self._channels(self.std)).float()

    def encoded(self, images: Tensor) -> Tensor:
        """The images that the exported model takes, from normalised ones that `levels` made exact."""
        return images if self.form == "float32" else self.levels("images", images)[0]

    def levels(self, name: str, images: Tensor) -> tuple[Tensor, float]:
        """Normalised images as images in 8 bits.

        Args:
            name: The argument that holds them.
            images: (B, C, H, W); uint8 images are taken as they are.

        Returns:
            (B, C, H, W) uint8 images, and the largest distance of a pixel from its level, in levels: 0 up to rounding
            where the normalised images were made of images in 8 bits.

        Raises:
            ArgumentError: If a pixel is below 0 or above 255: other `mean` and `std` were used.
        """
        if images.dtype == torch.uint8:
            return images, 0.0
        exact = (images.double() * self._channels(self.std) + self._channels(self.mean)) * _LEVELS
        rounded = exact.round()
        low, high = float(exact.min()), float(exact.max())
        if not (rounded.min() >= 0 and rounded.max() <= _LEVELS):
            raise ArgumentError(
                f"`{name}` must be images of 0 to {_LEVELS}, normalised with mean {self.mean} and std {self.std}, for "
                f"a model that takes uint8 images; without the normalisation they are {low:.4g} to {high:.4g}."
            )
        return rounded.to(torch.uint8), float((exact - rounded).abs().max())

    def module(self) -> nn.Module | None:
        """What normalises inside of the model; None where nothing does."""
        if self.form == "float32":
            return None
        return _Normalise(self._channels(self.mean), self._channels(self.std))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {name: list(each) if isinstance(each, tuple) else each for name, each in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageInput":
        """The inverse of `to_dict`."""
        plain: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
        return cls(**plain)

    @staticmethod
    def _channels(values: tuple[float, ...] | None) -> Tensor:
        return torch.tensor(values or (), dtype=torch.float64)[:, None, None]


class _Normalise(nn.Module):
    """Scales images of 0 to 255 to [0, 1] and normalises them, as one product and one sum.

    Args:
        mean: (C, 1, 1), float64.
        std: (C, 1, 1), float64.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", (1 / (_LEVELS * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, images: Tensor) -> Tensor:
        return images.float() * self.scale + self.shift


def input_of(form: InputForm, config: Mapping[str, Any], channels: int) -> ImageInput:
    """The input of a model.

    Args:
        form: As of `lightning_prune.export`.
        config: How images are prepared, with `mean` and `std`.
        channels: Number of channels of the images.

    Raises:
        ArgumentError: If mean or std are needed and not known, or there are other numbers of them than channels.
    """
    if form == "float32":
        return ImageInput()
    found = {}
    for name in ("mean", "std"):
        given = config.get(name)
        expected = f"a mapping with `{name}`, 1 or {channels} numbers{' > 0' if name == 'std' else ''}, with inputs="
        values = tuple(given) if isinstance(given, list | tuple) else ()
        numbers = all(isinstance(each, int | float) and (name == "mean" or each > 0) for each in values)
        known = {"mean": config.get("mean"), "std": config.get("std")}
        check("preprocessing", known, f"{expected}{form!r}", numbers and len(values) in (1, channels))
        found[name] = tuple(map(float, values))
    return ImageInput(form, **found)
