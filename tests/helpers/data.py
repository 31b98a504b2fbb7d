"""Images of noise, the same each time, and loaders of them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from .models import CLASSES


def noise_images(
    count: int = 2,
    channels: int = 3,
    size: int | tuple[int, int] = 32,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(count, channels, height, width) of standard normal noise, drawn in `dtype`.

    Fewer images are not the first of more: the generator works in blocks.
    """
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, height, width, generator=generator, dtype=dtype)


def labelled(count: int = 24, classes: int = CLASSES, *, seed: int = 1) -> TensorDataset:
    """Images with one label after the other."""
    return TensorDataset(noise_images(count, seed=seed), torch.arange(count) % classes)


def loader(count: int = 24, batch_size: int = 4, *, seed: int = 1, **options: Any) -> DataLoader[Any]:
    """Batches of images and labels."""
    return DataLoader(labelled(count, seed=seed), batch_size=batch_size, **options)
