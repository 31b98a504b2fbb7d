"""The embedded data: scikit-learn's handwritten digits on a cluttered canvas.

scikit-learn has 1,797 scans of handwritten digits, 8 x 8 pixels each. Each scan is enlarged, slanted a little and
placed on a 56 x 56 canvas among fragments of other scans (as in cluttered MNIST). Most of the canvas is background,
which a model may ignore, but parts of the background look like digits.
"""

from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from lightning_prune._utils.validation import check_between, check_choice, check_int

CLASSES = 10
CLUTTER = 0.5
MEAN, STD = 0.19, 0.19  # of the pixels at clutter 1, as in most of the training
HELD_OUT_SCANS = 500

# A constant and not an argument, because the embedded weights were trained with this split.
_SPLIT_SEED = 2407
_SPLITS = ("train", "held_out")

CANVAS = 56  # side in pixels

Floats = NDArray[np.float32]
Box = tuple[float, float, float]  # top, left and side of a digit on the canvas, in pixels

_SIZES = (20.0, 28.0)  # side of the enlarged scan on the canvas, in pixels
_FRAGMENTS = (4, 8)  # number of pieces of other scans


class Drawing(NamedTuple):
    """A digit on a canvas.

    Attributes:
        canvas: `(56, 56)` in [0, 1].
        box: Top, left and side of the digit, in pixels.
        strokes: `(56, 56)` in [0, 1], the digit alone.
    """

    canvas: Floats
    box: Box
    strokes: Floats


def draw(scans: Floats, index: int, rng: np.random.Generator, clutter: float) -> Drawing:
    """Draws one scan on a cluttered canvas.

    Args:
        scans: Scans to take the digit and the fragments from, `(S, 8, 8)` in [0, 1].
        index: Index of the scan.
        rng: Generator of places, sizes and clutter.
        clutter: Contrast of everything but the digit, from 0 to 1.

    Returns:
        The canvas, the box of the digit, and the digit alone.

    Example:
        >>> import numpy as np
        >>> from lightning_prune.classification.digits import draw
        >>> drawing = draw(np.ones((2, 8, 8), np.float32), 0, np.random.default_rng(0), 1.0)
        >>> drawing.canvas.shape
        (56, 56)
    """
    side = float(rng.uniform(*_SIZES))
    top, left = (float(edge) for edge in rng.uniform(0.0, CANVAS - side, size=2))
    strokes = _paste(scans[index], top, left, side / 8, slant=rng.uniform(-0.15, 0.15)) * rng.uniform(0.8, 1.0)
    box = (top, left, side)
    canvas = np.maximum(strokes, clutter * _clutter(scans, index, box, rng))
    return Drawing(np.clip(canvas, 0, 1).astype(np.float32), box, strokes.astype(np.float32))


def _clutter(scans: Floats, index: int, box: Box, rng: np.random.Generator) -> Floats:
    """Draws everything but the digit: a faint gradient, noise, and fragments of other scans outside the digit's box."""
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
        piece: What to draw, `(H, W)` in [0, 1].
        top: Upper edge on the canvas, in pixels.
        left: Left edge on the canvas, in pixels.
        pixel: Side of one pixel of the piece on the canvas, in pixels.
        slant: Shift to the left per pixel downwards, about the middle of the piece.

    Returns:
        The canvas, `(56, 56)`.
    """
    at = np.arange(CANVAS, dtype=np.float32) + 0.5
    rows = _tents((at - top) / pixel, piece.shape[0]) @ piece
    if not slant:
        return (rows @ _tents((at - left) / pixel, piece.shape[1]).T).astype(np.float32)
    shift = slant * (at - top - pixel * piece.shape[0] / 2)
    columns = _tents((at[None, :] + shift[:, None] - left) / pixel, piece.shape[1])
    return np.einsum("yk,yxk->yx", rows, columns).astype(np.float32)


def _tents(position: NDArray[np.floating], count: int) -> Floats:
    """Weights of `count` pixel centres at each position, `(..., count)`."""
    centres = np.arange(count, dtype=np.float32) + 0.5
    return np.maximum(0.0, 1.0 - np.abs(position[..., None] - centres)).astype(np.float32)


class ClutteredDigits(Dataset[tuple[torch.Tensor, int]]):
    """Handwritten digits at random places and sizes on a cluttered 56 x 56 canvas.

    An image depends on `(seed, split, index)` only, not on workers, order or earlier calls. Index i is scan `i % scans`
    in its placement `i // scans`. Indices from `len(self)` on are valid too and give further placements, so that a
    sampler can use new placements in every epoch.

    Args:
        split: "train" (1,297 scans) or "held_out" (500). No scan is in both; the clutter is of the same split.
        placements: Renderings of each scan; the length is scans times placements.
        seed: Seed of places, sizes and clutter. It does not change the split.
        clutter: Contrast of everything but the digit: at 1 fragments are as bright as the digit, at 0 the digit is
            alone on black.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from lightning_prune.classification.digits import ClutteredDigits
        >>> image, label = ClutteredDigits("held_out", placements=4)[0]
        >>> image.shape, type(label)
        (torch.Size([1, 56, 56]), <class 'int'>)
    """

    def __init__(
        self, split: Literal["train", "held_out"], placements: int = 1, seed: int = 0, clutter: float = CLUTTER
    ) -> None:
        check_choice("split", split, _SPLITS)
        check_int("placements", placements, 1)
        check_int("seed", seed, 0)
        check_between("clutter", clutter, 0, 1)
        self.split = split
        self.placements = placements
        self.seed = seed
        self.clutter = clutter
        self.scans, self.labels = load_scans(split)

    def __len__(self) -> int:
        return len(self.scans) * self.placements

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        canvas = self.render(index).canvas
        return torch.from_numpy((canvas - MEAN) / STD).unsqueeze(0), int(self.labels[index % len(self.scans)])

    def render(self, index: int) -> Drawing:
        """Draws image `index` without normalisation.

        Args:
            index: See the class; >= 0.

        Returns:
            The canvas in [0, 1], the box of the digit, and the digit alone.
        """
        if index < 0:
            raise IndexError(f"`index` must be an integer >= 0, got {index}.")
        placement, scan = divmod(index, len(self.scans))
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), scan, placement])
        return draw(self.scans, scan, rng, self.clutter)


@cache
def load_scans(split: str) -> tuple[Floats, NDArray[np.int64]]:
    """Reads one part of the split.

    Args:
        split: "train" or "held_out".

    Returns:
        The scans, `(S, 8, 8)` in [0, 1], and their labels, `(S,)`.
    """
    from sklearn.datasets import load_digits  # takes a second to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scans = (digits.images / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    parts = train_test_split(np.arange(len(scans)), test_size=HELD_OUT_SCANS, stratify=labels, random_state=_SPLIT_SEED)
    chosen = np.sort(parts[_SPLITS.index(split)])
    return scans[chosen], labels[chosen]


class EpochSampler(Sampler[int]):
    """Shuffles the scans of `ClutteredDigits`, in new placements every epoch.

    Lightning calls `set_epoch`, so a resumed training continues with the placements of its epoch.

    Args:
        scans: Number of scans.
        seed: Seed of the order.
    """

    def __init__(self, scans: int, seed: int = 0) -> None:
        self.scans = scans
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.scans

    def __iter__(self) -> Iterator[int]:
        shuffle = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.scans, generator=shuffle) + self.epoch * self.scans
        return iter(order.tolist())
