"""Real handwritten digits on a cluttered canvas: images with a background, for a machine that has no images.

scikit-learn ships 1,797 scans of handwritten digits, 8 x 8 pixels each. Here every scan is enlarged, slanted a
little and placed somewhere on a 56 x 56 canvas among fragments of other scans (as in cluttered MNIST), so that most
of the canvas is background that a model may do without, but not all of it looks like background.
"""

from collections.abc import Iterator
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from lightning_prune.canvas import Box, Floats, draw
from lightning_prune.errors import ArgumentError

CLASSES = 10
CLUTTER = 0.5
MEAN, STD = 0.19, 0.19  # of the pixels at clutter 1, which most of the training sees
HELD_OUT_SCANS = 500

# The split belongs to the weights that were trained on it: another one would leak held-out scans into training,
# so it is a constant and not an argument.
_SPLIT_SEED = 2407
_SPLITS = ("train", "held_out")


class ClutteredDigits(Dataset[tuple[torch.Tensor, int]]):
    """Handwritten digits at random places and sizes on a cluttered 56 x 56 canvas.

    An image depends on nothing but `(seed, split, index)`: not on workers, order or earlier calls. Index i shows scan
    `i % scans` in its placement `i // scans`. Indices from `len(self)` on are valid too and show further placements,
    so a sampler can make every epoch fresh without any state in the dataset.

    Args:
        split: "train" (1,297 scans) or "held_out" (500). No scan is in both, and clutter comes from the own split.
        placements: Renderings of each scan; the length is scans times placements.
        seed: Of places, sizes and clutter. It does not change the split.
        clutter: Contrast of everything but the digit: at 1 fragments are as bright as it, at 0 it is alone on black.

    Raises:
        ArgumentError: An argument is out of its range.

    Example:
        >>> from lightning_prune.digits import ClutteredDigits
        >>> image, label = ClutteredDigits("held_out", placements=4)[0]
        >>> image.shape, type(label)
        (torch.Size([1, 56, 56]), <class 'int'>)
    """

    def __init__(
        self, split: Literal["train", "held_out"], placements: int = 1, seed: int = 0, clutter: float = CLUTTER
    ) -> None:
        if split not in _SPLITS:
            raise ArgumentError(f"split: expected one of {', '.join(_SPLITS)}, got {split!r}")
        if placements < 1:
            raise ArgumentError(f"placements: expected at least 1, got {placements}")
        if seed < 0:
            raise ArgumentError(f"seed: expected 0 or more, got {seed}")
        if not 0 <= clutter <= 1:
            raise ArgumentError(f"clutter: expected a number from 0 to 1, got {clutter}")
        self.split = split
        self.placements = placements
        self.seed = seed
        self.clutter = clutter
        self.scans, self.labels = load_scans(split)

    def __len__(self) -> int:
        return len(self.scans) * self.placements

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        canvas, _ = self.render(index)
        return torch.from_numpy((canvas - MEAN) / STD).unsqueeze(0), int(self.labels[index % len(self.scans)])

    def render(self, index: int) -> tuple[Floats, Box]:
        """Draws image `index`, not normalised, and says where its digit is.

        Args:
            index: 0 or more; see the class for what it shows.

        Returns:
            The canvas, [56, 56] in [0, 1], and the box of the digit: top, left and side, in pixels.
        """
        if index < 0:
            raise IndexError(f"index: expected 0 or more, got {index}")
        placement, scan = divmod(index, len(self.scans))
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), scan, placement])
        return draw(self.scans, scan, rng, self.clutter)


@cache
def load_scans(split: str) -> tuple[Floats, NDArray[np.int64]]:
    """Reads one side of the split.

    Args:
        split: "train" or "held_out".

    Returns:
        The scans, [scans, 8, 8] in [0, 1], and their labels, [scans].
    """
    from sklearn.datasets import load_digits  # takes a second to import: only where digits are really read
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scans = (digits.images / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    sides = train_test_split(np.arange(len(scans)), test_size=HELD_OUT_SCANS, stratify=labels, random_state=_SPLIT_SEED)
    chosen = np.sort(sides[_SPLITS.index(split)])
    return scans[chosen], labels[chosen]


class FreshPlacements(Sampler[int]):
    """Shuffles the scans of `ClutteredDigits` and moves on to placements never shown before every epoch.

    Lightning calls `set_epoch`, so a resumed training goes on where it was.

    Args:
        scans: Number of scans.
        seed: Of the order.
    """

    def __init__(self, scans: int, seed: int = 0) -> None:
        self.scans = scans
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.scans

    def __iter__(self) -> Iterator[int]:
        shuffle = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.scans, generator=shuffle) + self.epoch * self.scans
        return iter(order.tolist())
