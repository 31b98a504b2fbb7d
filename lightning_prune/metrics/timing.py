"""Timing of batches: a clock that waits for the device, and the choice of the batches that tell its steady speed."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from lightning_prune.device import synchronize


class Step(NamedTuple):
    """One batch: number of images, and seconds."""

    images: int
    seconds: float


def steady(steps: Sequence[Step], warmup: int) -> list[Step]:
    """Leaves out the batches that tell nothing of the steady speed.

    These are the first ones (allocation, autotuning, compilation) and those of odd size: the short last batch is
    slower per image, and a compiled model recompiles for it.

    Args:
        steps: All batches of a run, in order.
        warmup: How many of the usual size to leave out at the start; at least one always stays.

    Returns:
        Batches of the most frequent size, without the first `warmup` of them. Empty only if `steps` is.

    Example:
        >>> from lightning_prune.metrics.timing import Step, steady
        >>> steady([Step(16, 0.9), Step(16, 0.1), Step(16, 0.1), Step(4, 0.05)], warmup=1)
        [Step(images=16, seconds=0.1), Step(images=16, seconds=0.1)]
    """
    if not steps:
        return []
    usual = Counter(step.images for step in steps).most_common(1)[0][0]
    even = [step for step in steps if step.images == usual]
    return even[min(warmup, len(even) - 1) :]


class StepTimer:
    """Times each batch twice: its forward pass, and end to end with loading, transfer and everything else.

    End to end is from the end of the batch before, so a loader that keeps up costs nothing. The first one counts from
    `start`, when its batch is there already.
    """

    def __init__(self) -> None:
        self.forward: list[Step] = []
        self.end_to_end: list[Step] = []
        self._mark: float | None = None
        self._images = 0

    def start(self) -> None:
        """Starts the clock of the first batch; without effect for the others."""
        if self._mark is None:
            self._mark = time.perf_counter()

    @contextmanager
    def timing(self, images: int, device: torch.device) -> Iterator[None]:
        """Times the forward pass of a batch.

        Args:
            images: Number of images in it.
            device: Where it runs; waited for on either side.
        """
        synchronize(device)
        begin = time.perf_counter()
        yield
        synchronize(device)
        self.forward.append(Step(images, time.perf_counter() - begin))
        self._images = images

    def stop(self) -> None:
        """Ends the batch: from here on the next one counts."""
        now = time.perf_counter()
        if self._mark is not None and self._images:
            self.end_to_end.append(Step(self._images, now - self._mark))
        self._mark, self._images = now, 0
