"""Milliseconds per batch."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_prune.errors import ArgumentError


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
    `lightning_prune.metrics.steady` leaves out warm-up and batches of odd size.

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
