"""Draws small greyscale scans on a larger canvas with clutter around."""

import numpy as np
from numpy.typing import NDArray

CANVAS = 56  # side in pixels

Floats = NDArray[np.float32]
Box = tuple[float, float, float]  # top, left and side of a digit on the canvas, in pixels

_SIZES = (20.0, 28.0)  # side of the enlarged scan on the canvas, in pixels
_FRAGMENTS = (4, 8)  # how many pieces of other scans lie around


def draw(scans: Floats, index: int, rng: np.random.Generator, clutter: float) -> tuple[Floats, Box]:
    """Draws one scan on a cluttered canvas.

    Args:
        scans: Scans to take the digit and the fragments from, [scans, 8, 8] in [0, 1].
        index: The scan to show.
        rng: Decides everything random.
        clutter: Contrast of everything but the digit, from 0 to 1.

    Returns:
        The canvas, [56, 56] in [0, 1], and where the digit is.

    Example:
        >>> import numpy as np
        >>> from lightning_prune.canvas import draw
        >>> canvas, (top, left, side) = draw(np.ones((2, 8, 8), np.float32), 0, np.random.default_rng(0), 1.0)
        >>> canvas.shape
        (56, 56)
    """
    side = float(rng.uniform(*_SIZES))
    top, left = (float(edge) for edge in rng.uniform(0.0, CANVAS - side, size=2))
    strokes = _paste(scans[index], top, left, side / 8, slant=rng.uniform(-0.15, 0.15)) * rng.uniform(0.8, 1.0)
    box = (top, left, side)
    canvas = np.maximum(strokes, clutter * _clutter(scans, index, box, rng))
    return np.clip(canvas, 0, 1).astype(np.float32), box


def _clutter(scans: Floats, index: int, box: Box, rng: np.random.Generator) -> Floats:
    """Draws everything but the digit: a faint gradient, noise, and fragments of other scans beside the digit's box."""
    ramp = np.linspace(-0.5, 0.5, CANVAS, dtype=np.float32)
    slopes = rng.uniform(-0.15, 0.15, size=2)
    canvas = 0.1 + slopes[0] * ramp[:, None] + slopes[1] * ramp + rng.normal(0.0, 0.04, (CANVAS, CANVAS))
    canvas = canvas.astype(np.float32)
    for _ in range(rng.integers(_FRAGMENTS[0], _FRAGMENTS[1] + 1)):
        other = (index + rng.integers(1, len(scans))) % len(scans)
        height, width = rng.integers(3, 6, size=2)
        row, column = rng.integers(0, 9 - height), rng.integers(0, 9 - width)
        piece = scans[other, row : row + height, column : column + width]
        pixel = rng.uniform(*_SIZES) / 8
        contrast = rng.uniform(0.5, 1.0)
        for top, left in rng.uniform(-pixel, CANVAS - 2 * pixel, size=(8, 2)):
            if _apart((top, left, height * pixel, width * pixel), box):
                canvas = np.maximum(canvas, contrast * _paste(piece, top, left, pixel))
                break
    return canvas


def _apart(piece: tuple[float, float, float, float], box: Box) -> bool:
    """Whether a fragment (top, left, height, width) lies outside the digit's box (top, left, side)."""
    top, left, height, width = piece
    return (
        top + height <= box[0] or top >= box[0] + box[2] or left + width <= box[1] or left >= box[1] + box[2]
    )  # fmt: skip


def _paste(piece: Floats, top: float, left: float, pixel: float, slant: float = 0.0) -> Floats:
    """Enlarges a piece bilinearly onto an empty canvas.

    Bilinear interpolation is separable, so two small matrices of tent functions do it at any subpixel position.

    Args:
        piece: What to draw, [height, width] in [0, 1].
        top: Upper edge on the canvas, in pixels.
        left: Left edge on the canvas, in pixels.
        pixel: Side of one pixel of the piece on the canvas, in pixels.
        slant: Shift to the left per pixel downwards, about the middle of the piece.

    Returns:
        The canvas, [56, 56].
    """
    at = np.arange(CANVAS, dtype=np.float32) + 0.5
    rows = _tents((at - top) / pixel, piece.shape[0]) @ piece
    if not slant:
        return (rows @ _tents((at - left) / pixel, piece.shape[1]).T).astype(np.float32)
    shift = slant * (at - top - pixel * piece.shape[0] / 2)
    columns = _tents((at[None, :] + shift[:, None] - left) / pixel, piece.shape[1])
    return np.einsum("yk,yxk->yx", rows, columns).astype(np.float32)


def _tents(position: NDArray[np.floating], count: int) -> Floats:
    """Weights of `count` pixel centres at each position, [..., count]."""
    centres = np.arange(count, dtype=np.float32) + 0.5
    return np.maximum(0.0, 1.0 - np.abs(position[..., None] - centres)).astype(np.float32)
