"""Milliseconds per batch, and the timer that measures them."""

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
from lightning_prune._utils.validation import check_between, check_not_negative


class Step(NamedTuple):
    """One timed batch.

    Attributes:
        images: Number of images.
        seconds: Duration.
    """

    images: int
    seconds: float


def drop_warmup(steps: Sequence[Step], warmup: int) -> list[Step]:
    """Leaves out batches that do not run at steady speed.

    These are the first batches (allocation, autotuning, compilation) and batches of another size: a short last batch is
    slower per image, and a compiled model recompiles for it.

    Args:
        steps: All batches of a run, in order.
        warmup: Number of batches of the usual size to leave out at the start; at least one is kept.

    Returns:
        Batches of the most frequent size, without the first `warmup` of them. Empty only if `steps` is.

    Example:
        >>> from lightning_prune.metrics.latency import Step, drop_warmup
        >>> drop_warmup([Step(16, 0.9), Step(16, 0.1), Step(16, 0.1), Step(4, 0.05)], warmup=1)
        [Step(images=16, seconds=0.1), Step(images=16, seconds=0.1)]
    """
    if not steps:
        return []
    batch_size = Counter(step.images for step in steps).most_common(1)[0][0]
    full = [step for step in steps if step.images == batch_size]
    return full[min(warmup, len(full) - 1) :]


class StepTimer:
    """Times each batch twice: its forward pass, and end to end, including loading and transfer.

    The end-to-end time begins at the end of the previous batch, so a loader that keeps up adds nothing. For the first
    batch it begins at `start`, after the batch is loaded.

    Attributes:
        forward: Forward passes, in order.
        end_to_end: Whole batches, in order.
    """

    def __init__(self) -> None:
        self.forward: list[Step] = []
        self.end_to_end: list[Step] = []
        self._mark: float | None = None
        self._images = 0

    def start(self) -> None:
        """Starts the clock of the first batch; does nothing for the others."""
        if self._mark is None:
            self._mark = time.perf_counter()

    @contextmanager
    def timing(self, images: int, device: torch.device) -> Iterator[None]:
        """Times the forward pass of a batch.

        Args:
            images: Number of images in it.
            device: The device that computes; synchronised before and after.
        """
        synchronize(device)
        begin = time.perf_counter()
        yield
        synchronize(device)
        self.forward.append(Step(images, time.perf_counter() - begin))
        self._images = images

    def stop(self) -> None:
        """Ends the batch and starts the clock of the next one."""
        now = time.perf_counter()
        if self._mark is not None and self._images:
            self.end_to_end.append(Step(self._images, now - self._mark))
        self._mark, self._images = now, 0


def slowest_quantile(milliseconds: Tensor, ranks: Tensor, quantile: float) -> Tensor:
    """The largest of the quantiles of the ranks' batches.

    Args:
        milliseconds: (N,) duration of each batch.
        ranks: (N,) rank that ran it.
        quantile: From 0 to 1; interpolated linearly between two batches.

    Returns:
        Milliseconds, a scalar; NaN without batches.
    """
    if not len(milliseconds):
        return torch.tensor(torch.nan, device=milliseconds.device)
    return torch.stack([milliseconds[ranks == rank].quantile(quantile) for rank in ranks.unique()]).max()


class Latency(Metric):
    """A quantile of the time per batch, in milliseconds.

    Over several processes it is the quantile of the slowest rank, for which the others wait. All batches are counted;
    use `lightning_prune.metrics.drop_warmup` to leave out warm-up and batches of another size.

    Args:
        quantile: 0.5 for the median (p50), 0.9 for p90.
        **kwargs: See `torchmetrics.Metric`.

    Raises:
        ArgumentError: If `quantile` is outside [0, 1].

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
        check_between("quantile", quantile, 0, 1)
        self.quantile = quantile
        # Each batch carries its rank, as a gathered list does not say which rank a batch is from.
        self.add_state("milliseconds", default=[], dist_reduce_fx="cat")
        self.add_state("ranks", default=[], dist_reduce_fx="cat")

    def update(self, seconds: float) -> None:
        """Adds one batch.

        Args:
            seconds: Duration of the batch.

        Raises:
            ArgumentError: If it is negative.
        """
        check_not_negative("seconds", seconds)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        self.milliseconds.append(torch.tensor([1e3 * seconds], device=self.device))
        # Float, because a rank without batches gathers an empty float tensor and gathering needs one dtype.
        self.ranks.append(torch.tensor([float(rank)], device=self.device))

    def compute(self) -> Tensor:
        """Returns milliseconds per batch, a scalar; NaN with a warning if nothing was measured."""
        # A synchronised state is a tensor, and an empty state a list.
        batches = dim_zero_cat(self.milliseconds) if len(self.milliseconds) else torch.empty(0, device=self.device)
        if not len(batches):
            warnings.warn("Latency is NaN, because nothing was measured.", stacklevel=2)
            return torch.tensor(torch.nan, device=self.device)
        return slowest_quantile(batches, dim_zero_cat(self.ranks), self.quantile)
