"""Joules per image and watts."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_prune._utils.validation import check_choice, check_not_negative

QUANTITIES = ("joules_per_image", "watts")


def ratio(joules: Tensor, amount: Tensor) -> Tensor:
    """Energy per image or second; NaN if there are none."""
    return torch.where(amount > 0, joules / amount, torch.nan)


class Energy(Metric):
    """Energy per image or mean power: a sum over a sum, not a mean of rates.

    Ranks work at the same time on devices of their own, so over several processes joules and images are summed, and the
    seconds are those of the slowest rank. Processes that share a counter, such as processes on one CPU, must report its
    joules once and 0 otherwise. Windows should be at least a second long, as counters are updated every 0.1 s.

    Args:
        quantity: `"joules_per_image"` or `"watts"`.
        **kwargs: See `torchmetrics.Metric`.

    Raises:
        ArgumentError: If `quantity` has another value.

    Example:
        >>> from lightning_prune.metrics import Energy
        >>> metric = Energy("joules_per_image")
        >>> metric.update(joules=30.0, images=16, seconds=1.0)
        >>> metric.update(joules=50.0, images=16, seconds=1.5)
        >>> metric.compute()
        tensor(2.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    joules: Tensor
    images: Tensor
    seconds: Tensor

    def __init__(self, quantity: str = "joules_per_image", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("quantity", quantity, QUANTITIES)
        self.quantity = quantity
        self.add_state("joules", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("seconds", default=torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, joules: float, images: int, seconds: float) -> None:
        """Adds one window.

        Args:
            joules: Energy that the device used.
            images: Number of images.
            seconds: Length of the window.

        Raises:
            ArgumentError: If one of them is negative.
        """
        for name, number in (("joules", joules), ("images", images), ("seconds", seconds)):
            check_not_negative(name, number)
        self.joules += joules
        self.images += images
        self.seconds += seconds

    def compute(self) -> Tensor:
        """Returns joules per image or watts, a scalar; NaN with a warning if nothing was measured."""
        amount = self.seconds if self.quantity == "watts" else self.images
        if not amount > 0:
            warnings.warn("Energy is NaN, because nothing was measured.", stacklevel=2)
        return ratio(self.joules, amount)
