"""Divides images into patches, as Vision Transformers do."""

import math

from torch import Tensor

from lightning_prune.errors import UnsupportedModelError


def patch_side(height: int, width: int, count: int) -> int:
    """The side of the square patches if an image is divided into `count` of them.

    A border narrower than a patch is ignored, as by a strided convolution, if only one patch size gives that count.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        count: Number of patches.

    Returns:
        The side of a patch, in pixels.

    Raises:
        UnsupportedModelError: If no patch size, or more than one, gives that count.

    Example:
        >>> from lightning_prune.reduction.patchify import patch_side
        >>> patch_side(224, 224, 196), patch_side(160, 320, 200), patch_side(384, 384, 729)
        (16, 16, 14)
    """
    side = int(math.sqrt(height * width // count)) if count > 0 else 0  # isqrt is not traced for sizes that vary
    if side and (height // side) * (width // side) == count:
        exact = height % side == 0 and width % side == 0
        if exact or (side > 1 and (height // (side - 1)) * (width // (side - 1)) != count):
            return side
    raise UnsupportedModelError(
        f"{count} patch tokens do not form a grid of square patches of an image of {height} x {width} pixels. Methods "
        "that read pixels need such a grid."
    )


def cut(images: Tensor, side: int) -> Tensor:
    """Divides images into square patches, row by row; a border narrower than a patch is ignored.

    Args:
        images: (B, channels, height, width).
        side: Side of a patch, in pixels.

    Returns:
        (B, patches, channels * side * side). A patch is stored channel by channel, each row by row.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.patchify import cut
        >>> cut(torch.arange(8.0).view(1, 1, 2, 4), side=2)[0].tolist()
        [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    batch, channels, height, width = images.shape
    rows, columns = height // side, width // side
    # A slice of everything would be an `alias` in an exported graph, which few runtimes have.
    if (rows * side, columns * side) != (height, width):
        images = images[:, :, : rows * side, : columns * side]
    grid = images.reshape(batch, channels, rows, side, columns, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * side * side)


def cut_like(pixels: Tensor | None, count: int) -> Tensor:
    """Divides images into as many patches as a model has patch tokens.

    Args:
        pixels: (B, channels, height, width).
        count: Number of patch tokens.

    Returns:
        (B, count, D), see `cut`.

    Raises:
        UnsupportedModelError: If the tokens do not form a grid of square patches of the images.
    """
    if pixels is None or pixels.ndim != 4:
        got = "nothing" if pixels is None else f"a tensor of shape {tuple(pixels.shape)}"
        raise UnsupportedModelError(
            f"The model input must be images (B, channels, height, width) for methods that read pixels, got {got}."
        )
    return cut(pixels, patch_side(pixels.shape[2], pixels.shape[3], count))
