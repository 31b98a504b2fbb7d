"""The patches of an image, cut as a Vision Transformer cuts them."""

import math

from torch import Tensor

from lightning_prune.errors import UnsupportedModelError


def patch_side(height: int, width: int, count: int) -> int:
    """The side of square patches of which an image has `count`, in rows and columns of the image's own aspect.

    A border that is narrower than a patch is left over, as a convolution leaves it, where one side alone gives that
    count.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        count: Number of patches.

    Returns:
        Pixels.

    Raises:
        UnsupportedModelError: If there is no such side, or more than one would do.

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
        f"{count} patch tokens are no grid of square patches of an image of {height} x {width} pixels, so which pixels "
        "belong to which token is unknown; methods that read pixels need to know."
    )


def cut(images: Tensor, side: int) -> Tensor:
    """Cuts images into square patches, row by row; a border narrower than a patch is left out.

    Args:
        images: (B, channels, height, width).
        side: Of a patch, in pixels.

    Returns:
        (B, patches, channels * side * side): a patch holds its first channel row by row, then the next.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.patchify import cut
        >>> cut(torch.arange(8.0).view(1, 1, 2, 4), side=2)[0].tolist()
        [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    batch, channels, height, width = images.shape
    rows, columns = height // side, width // side
    grid = images[:, :, : rows * side, : columns * side].reshape(batch, channels, rows, side, columns, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * side * side)


def cut_like(pixels: Tensor | None, count: int) -> Tensor:
    """The patches (B, count, D) of images (B, channels, height, width) that a model made `count` patch tokens of.

    Raises:
        UnsupportedModelError: If the tokens do not form a grid of square patches of the images.
    """
    if pixels is None or pixels.ndim != 4:
        came = "nothing" if pixels is None else f"a tensor of shape {tuple(pixels.shape)}"
        raise UnsupportedModelError(
            f"Methods that read pixels need images (batch, channels, height, width) to enter the model, got {came}."
        )
    return cut(pixels, patch_side(pixels.shape[2], pixels.shape[3], count))
