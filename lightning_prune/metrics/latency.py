"""Latency of steps as a metric, and the timer that measures it."""

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_prune._utils.device import synchronize
from lightning_prune.errors import ArgumentError


class Step(NamedTuple):
    """One batch: number of images, and seconds."""

    images: int
    seconds: float


def drop_warmup(steps: Sequence[Step], warmup: int) -> list[Step]:
    """Leaves out the batches that tell nothing of the steady speed.

    These are the first ones (allocation, autotuning, compilation) and those of odd size: the short last batch is
    slower per image, and a compiled model recompiles for it.

    Args:
        steps: All batches of a run, in order.
        warmup: How many of the usual size to leave out at the start; at least one always stays.

    Returns:
        Batches of the most frequent size, without the first `warmup` of them. Empty only if `steps` is.

    Example:
        >>> from lightning_prune.metrics.latency import Step, drop_warmup
        >>> drop_warmup([Step(16, 0.9), Step(16, 0.1), Step(16, 0.1), Step(4, 0.05)], warmup=1)
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


def slowest_quantile(milliseconds: Tensor, ranks: Tensor, quantile: float) -> Tensor:
    """Takes the quantile of each rank's batches, and of those the largest.

    Args:
        milliseconds: Duration of each batch, [batches].
        ranks: Which rank ran it, [batches].
        quantile: From 0 to 1; between two batches it is interpolated linearly.

    Returns:
        Milliseconds, a scalar; NaN where there are no batches.
    """
    if not len(milliseconds):
        return torch.tensor(torch.nan, device=milliseconds.device)
    return torch.stack([milliseconds[ranks == rank].quantile(quantile) for rank in ranks.unique()]).max()


class Latency(Metric):
    """A percentile of the time per batch, in milliseconds.

    Over several processes it is that of the slowest rank, which the others wait for. It measures what it is given:
    `lightning_prune.metrics.drop_warmup` leaves out warm-up and batches of odd size.

    Args:
        quantile: 0.5 for the median (p50), 0.95 for p95.
        **kwargs: As for any `torchmetrics.Metric`.

    Raises:
        ArgumentError: `quantile` is outside [0, 1].

    Example:
        >>> from lightning_prune.metrics import Latency
        >>> metric = Latency(quantile=0.5)
        >>> for seconds in (0.010, 0.012, 0.050):
        ...     metric.update(seconds)
        >>> metric.compute()
        tensor(12.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    milliseconds: list[Tensor]
    ranks: list[Tensor]

    def __init__(self, quantile: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= quantile <= 1:
            raise ArgumentError(f"quantile: expected a number from 0 to 1, got {quantile}")
        self.quantile = quantile
        # Each batch carries its rank: after the gathering a flat list no longer tells whose a batch was.
        self.add_state("milliseconds", default=[], dist_reduce_fx="cat")
        self.add_state("ranks", default=[], dist_reduce_fx="cat")

    def update(self, seconds: float) -> None:
        """Adds one batch.

        Args:
            seconds: How long it took.

        Raises:
            ArgumentError: It is negative.
        """
        if seconds < 0:
            raise ArgumentError(f"seconds: expected 0 or more, got {seconds}")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        self.milliseconds.append(torch.tensor([1e3 * seconds], device=self.device))
        # Float, for a rank without batches gathers an empty float tensor, and gathering wants one type.
        self.ranks.append(torch.tensor([float(rank)], device=self.device))

    def compute(self) -> Tensor:
        """Returns milliseconds per batch, a scalar; NaN, with a warning, where nothing was measured."""
        # A synchronised state is one tensor already, and an empty one stays a list.
        batches = dim_zero_cat(self.milliseconds) if len(self.milliseconds) else torch.empty(0, device=self.device)
        if not len(batches):
            warnings.warn("Latency: nothing was measured, so it is NaN.", stacklevel=2)
            return torch.tensor(torch.nan, device=self.device)
        return slowest_quantile(batches, dim_zero_cat(self.ranks), self.quantile)
