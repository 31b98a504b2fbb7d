"""Images per second."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_prune._utils.validation import check_not_negative


def images_per_second(images: Tensor, seconds: Tensor) -> Tensor:
    """Images divided by seconds; NaN if no time was measured."""
    return torch.where(seconds > 0, images / seconds, torch.nan)


class Throughput(Metric):
    """Images per second: the sum of the images over the sum of the seconds, not a mean of rates.

    Ranks work at the same time, so over several processes the images are summed, and the seconds are those of the
    slowest rank. All batches are counted; use `lightning_prune.metrics.drop_warmup` to leave out warm-up and batches of
    another size.

    Args:
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> from lightning_prune.metrics import Throughput
        >>> metric = Throughput()
        >>> metric.update(images=16, seconds=0.5)
        >>> metric.update(images=16, seconds=1.5)
        >>> metric.compute()
        tensor(16.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    images: Tensor
    seconds: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("seconds", default=torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, images: int, seconds: float) -> None:
        """Adds one batch.

        Args:
            images: Number of images in it.
            seconds: Duration of the batch.

        Raises:
            ArgumentError: If one of them is negative.
        """
        check_not_negative("images", images)
        check_not_negative("seconds", seconds)
        self.images += images
        self.seconds += seconds

    def compute(self) -> Tensor:
        """Returns images per second, a scalar; NaN with a warning if nothing was measured."""
        if not self.seconds > 0:
            warnings.warn("Throughput is NaN, because nothing was measured.", stacklevel=2)
        return images_per_second(self.images, self.seconds)
