"""Scaling the images down before the model, so that they have fewer patches: no token is removed inside the model."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isqrt
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import is_exported
from lightning_prune.reduction.portable import exact_product

Grid = tuple[int, int]
"""Rows and columns of patches."""


@lru_cache(maxsize=256)
def smaller_grids(rows: int, columns: int) -> Mapping[Grid, int]:
    """The grids to which images of a model can be scaled down.

    Those of nearly the same aspect: the scales of the two sides, h / rows and w / columns, differ by at most one patch
    of the longer side. Of several grids with one number of patches, that whose scales differ least is listed; of two
    that are equally near, the one with fewer rows.

    Args:
        rows: Rows of patches of the dense model.
        columns: Columns of patches of the dense model.

    Returns:
        (h, w) -> h * w, the number of patch tokens, ascending, without the dense grid itself.

    Example:
        >>> from lightning_prune.reduction.resize import smaller_grids
        >>> list(smaller_grids(14, 14).items())[-4:]
        [((12, 12), 144), ((12, 13), 156), ((13, 13), 169), ((13, 14), 182)]
    """
    best: dict[int, tuple[int, int, int]] = {}  # patches -> difference of the scales (times both sides), h, w
    for h in range(1, rows + 1):
        nearest = h * columns // rows
        for w in range(max(nearest - 1, 1), min(nearest + 2, columns) + 1):
            difference = abs(h * columns - w * rows)
            if difference <= min(rows, columns) and (h, w) != (rows, columns):
                best[h * w] = min(best.get(h * w, (difference, h, w)), (difference, h, w))
    return {(h, w): patches for patches, (_, h, w) in sorted(best.items())}


def grid_of_count(rows: int, columns: int, patches: int) -> Grid:
    """The grid with a number of patches; see `smaller_grids`.

    Args:
        rows: Rows of patches of the dense model.
        columns: Columns of patches of the dense model.
        patches: Number of patches of the grid.

    Raises:
        ScheduleError: If there is none; names the nearest numbers of tokens to remove.
    """
    grids = smaller_grids(rows, columns)
    found = next((grid for grid, count in grids.items() if count == patches), None)
    if found is not None:
        return found
    dense = rows * columns
    below = max((count for count in grids.values() if count < patches), default=None)
    above = min((count for count in [*grids.values(), dense] if count > patches), default=None)
    near = " or ".join(f"{dense - count} (leaves {count} patches)" for count in (above, below) if count is not None)
    raise ScheduleError(
        f"`schedule` must remove a number of tokens that leaves a grid of patches with resize: {near}; got "
        f"{dense - patches}, which leaves {patches} of {rows} x {columns} patches."
    )


def largest_grid(rows: int, columns: int, patches: int) -> Grid:
    """The largest grid of at most a number of patches; the smallest of all if each has more. See `smaller_grids`.

    Args:
        rows: Rows of patches of the dense model.
        columns: Columns of patches of the dense model.
        patches: Number of patches; the dense grid itself if it has no more.
    """
    if patches >= rows * columns:
        return rows, columns
    grids = smaller_grids(rows, columns)
    fitting = [grid for grid, count in grids.items() if count <= patches]
    return fitting[-1] if fitting else next(iter(grids), (rows, columns))


def square_grid(patches: int) -> Grid:
    """The grid of that many patches which is most nearly square, with at least as many columns as rows.

    Example:
        >>> from lightning_prune.reduction.resize import square_grid
        >>> square_grid(196), square_grid(200)
        ((14, 14), (10, 20))
    """
    rows = next((h for h in range(isqrt(patches), 0, -1) if patches % h == 0), 1)
    return rows, patches // rows


def cell_of_patches(grid: Grid, smaller: Grid) -> list[int]:
    """The cell of a smaller grid that covers the middle of each patch, both row by row.

    Args:
        grid: Of the patches.
        smaller: Rows and columns of the cells, over the same image.

    Example:
        >>> from lightning_prune.reduction.resize import cell_of_patches
        >>> cell_of_patches((2, 3), (1, 2))
        [0, 1, 1, 0, 1, 1]
    """
    rows, columns = (
        [(2 * place + 1) * cells // (2 * patches) for place in range(patches)]
        for patches, cells in zip(grid, smaller, strict=True)
    )
    return [row * smaller[1] + column for row in rows for column in columns]


def resampling_matrix(size: int, new_size: int) -> Tensor:
    """The matrix that scales a row of pixels linearly, with antialiasing where it gets shorter.

    Each new pixel is the mean of the old ones, weighted by a triangle around its middle whose half width is the
    distance of the new pixels, as in Pillow and in `torch.nn.functional.interpolate(..., antialias=True)`.

    Args:
        size: Number of pixels.
        new_size: Number of new pixels.

    Returns:
        (new_size, size) float32; each row has the sum 1.

    Example:
        >>> from lightning_prune.reduction.resize import resampling_matrix
        >>> resampling_matrix(4, 2)
        tensor([[0.4286, 0.4286, 0.1429, 0.0000],
                [0.0000, 0.1429, 0.4286, 0.4286]])
    """
    scale = size / new_size
    middles = (np.arange(new_size) + 0.5) * scale
    distances = np.abs(np.arange(size) + 0.5 - middles[:, None]) / max(scale, 1.0)
    weights = np.clip(1 - distances, 0, None)
    return torch.tensor((weights / weights.sum(1, keepdims=True)).tolist(), dtype=torch.float32)


def scale_images(images: Tensor, size: Grid, matrices: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Scales images linearly, with antialiasing.

    Args:
        images: (B, channels, height, width).
        size: New height and width, in pixels.
        matrices: Those of `resampling_matrix` for the height and for the width, on the device of the images; computed
            if None. An exported graph has the products with them, which every runtime computes alike: not all of them
            have an operator that scales with antialiasing.

    Returns:
        (B, channels, *size), of the dtype of the images.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.resize import scale_images
        >>> scale_images(torch.ones(1, 3, 8, 8), (6, 4)).shape
        torch.Size([1, 3, 6, 4])
    """
    precise = torch.promote_types(images.dtype, torch.float32)
    if is_exported():
        height, width = images.shape[-2:]
        down, across = matrices or (resampling_matrix(int(height), size[0]), resampling_matrix(int(width), size[1]))
        down, across = (each.to(images.device, precise) for each in (down, across))
        scaled = exact_product(exact_product(down, images.to(precise)), across.transpose(0, 1))
        return scaled.to(images.dtype)
    # CPUs have no kernel for halves.
    wide = images.to(precise) if images.device.type == "cpu" else images
    return F.interpolate(wide, size, mode="bilinear", align_corners=False, antialias=True).to(images.dtype)


class Resize(Reduction):
    """Scales the images down before the model, so that they have fewer patches; positions are resampled.

    There is no reducing operation and no overhead in any block, and the graph runs wherever the dense one does. It is a
    floor that a method should beat: what is lost is detail everywhere, and not the tokens that matter least. The
    position embeddings, bias tables and rotary embeddings are resampled as the library of the model does for
    images of another size, as in arXiv 2010.11929, section 3.2, which interpolates them for larger images.

    A schedule removes all tokens in block 0, and N - R - P has to be h * w of a grid of nearly the same aspect:
    `smaller_grids` lists them. A share, or `KeepRates`, becomes the largest grid of at most that many patches, for each
    image size separately.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "resize", 52)  # 12 x 12 patches of 14 x 14
        >>> handle.schedule.tokens(197)[-1]
        145
    """

    name: str = "resize"
    site: Literal["block", "input"] = "input"
    scales_images: bool = True

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Raises ArgumentError: images are scaled before they are tokens."""
        raise ArgumentError(f"`sequence` must be images with resize, got {sequence.tokens.shape[1]} tokens.")

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """As many as the smallest grid leaves out; see `possible_counts`."""
        possible = self.possible_counts(tokens, num_prefix_tokens)
        return tokens - possible[0] if possible else 0

    def possible_counts(self, tokens: int, num_prefix_tokens: int, grid: Grid | None = None) -> Sequence[int]:
        """Those of `smaller_grids`, of the most nearly square grid of N - P patches if none is given."""
        if tokens <= num_prefix_tokens:
            return ()
        rows, columns = square_grid(tokens - num_prefix_tokens) if grid is None else grid
        return tuple(num_prefix_tokens + patches for patches in smaller_grids(rows, columns).values())
