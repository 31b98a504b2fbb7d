"""The picture of an image after a reduction: what was dropped, merged and kept, painted over its pixels."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TINTS = ((0.96, 0.55, 0.05), (0.45, 0.25, 0.75), (0.0, 0.55, 0.55))  # of tokens that hold what is left over
_PAPER = 0.93  # what dropped patches fade to
_FADED = 0.80
_TINTED = 0.55
_LENT = 0.6  # how much of a lent hue goes into a group of a grey picture
_GOLDEN = 0.618034  # steps of this part of the circle of hues keep neighbours apart, however many follow


def shared(groups: Ints) -> Ints:
    """The tokens that hold two or more patches of this image, those that hold most first.

    Args:
        groups: (patches,) the token that each patch went into, -1 where it was dropped.
    """
    tokens, counts = np.unique(groups[groups >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return tokens[order][counts[order] > 1].astype(np.int64)


def paint(picture: Floats, groups: Ints, grid: tuple[int, int], tinted: bool) -> Floats:
    """Paints what became of the patches over the picture.

    Dropped patches fade to grey paper. Patches that are one token get one translucent tint where `tinted`, and else
    the mean colour of their pixels; grey pictures, whose mean colours look alike, are lent a hue for each token.
    Patches that are kept as they are keep their pixels.

    Args:
        picture: (height, width, 3), 0 to 1.
        groups: (rows * columns,) the token that each patch went into, -1 where it was dropped.
        grid: Rows and columns of patches.
        tinted: Whether the tokens of this picture hold what is left over, so that their pixels have little in common.

    Returns:
        (height, width, 3), 0 to 1.

    Example:
        >>> picture = np.zeros((2, 4, 3))
        >>> picture[:, 3] = 1
        >>> painted = paint(picture, np.array([-1, 0, 1, 1]), (1, 4), tinted=False)
        >>> painted[0, :, 0].round(2).tolist()  # faded, kept, and two of one token, in one colour
        [0.74, 0.0, 0.45, 0.45]
    """
    where = to_pixels(groups, grid, picture.shape[:2])
    painted = picture.copy()
    luma = picture @ np.array([0.299, 0.587, 0.114])
    dropped = where < 0
    painted[dropped] = (_FADED * _PAPER + (1 - _FADED) * luma[dropped])[:, None]
    grey = bool(np.ptp(picture, axis=2).max() < 0.02)
    for number, token in enumerate(shared(groups).tolist()):
        inside = where == token
        if tinted:
            tint = np.array(TINTS[number % len(TINTS)])
            painted[inside] = _TINTED * tint + (1 - _TINTED) * picture[inside]
            continue
        mean = picture[inside].mean(axis=0)
        painted[inside] = (1 - _LENT) * mean + _LENT * _hue(number) if grey else mean
    return painted


def to_pixels(groups: Ints, grid: tuple[int, int], size: tuple[int, int]) -> Ints:
    """(height, width): the token of each pixel's patch, for patches that need not divide the picture evenly."""
    rows, columns = (np.arange(pixels) * cells // pixels for pixels, cells in zip(size, grid, strict=True))
    pixels: Ints = groups.reshape(grid)[rows[:, None], columns[None, :]]
    return pixels


def borders(groups: Ints, grid: tuple[int, int], size: tuple[int, int]) -> Floats:
    """The edges of patches where a token of several patches, or what was dropped, ends.

    Args:
        groups: (rows * columns,) the token that each patch went into, -1 where it was dropped.
        grid: Rows and columns of patches.
        size: Height and width of the picture in pixels.

    Returns:
        (edges, 2, 2): both ends of each as x and y, in pixels of an image that is shown with its corner at 0, 0.
    """
    tokens = groups.reshape(grid)
    bounded = np.isin(tokens, shared(groups)) | (tokens < 0)
    down, across = size[0] / grid[0], size[1] / grid[1]
    beside = (tokens[:, 1:] != tokens[:, :-1]) & (bounded[:, 1:] | bounded[:, :-1])
    below = (tokens[1:] != tokens[:-1]) & (bounded[1:] | bounded[:-1])
    row, column = np.nonzero(beside)
    x, y = (column + 1) * across, row * down
    upright = np.stack([np.stack([x, y], -1), np.stack([x, y + down], -1)], 1)
    row, column = np.nonzero(below)
    x, y = column * across, (row + 1) * down
    level = np.stack([np.stack([x, y], -1), np.stack([x + across, y], -1)], 1)
    edges: Floats = np.concatenate([upright, level]).astype(np.float64)
    return edges


def strokes(groups: Ints, grid: tuple[int, int], size: tuple[int, int]) -> Floats:
    """(dropped, 2, 2): a line across each dropped patch, which tells it from pixels that are pale; as `borders`."""
    down, across = size[0] / grid[0], size[1] / grid[1]
    row, column = np.nonzero(groups.reshape(grid) < 0)
    start, end = np.stack([column, row + 1], -1), np.stack([column + 1, row], -1)
    return np.stack([start, end], 1) * np.array([across, down])


def _hue(number: int) -> Floats:
    """A soft colour, far on the circle of hues from those just before."""
    turn = 6 * ((0.55 + number * _GOLDEN) % 1.0)
    bright: Floats = np.clip(np.abs((turn + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return 0.42 + 0.48 * bright
