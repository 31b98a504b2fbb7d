"""Accuracy of each group of images."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_prune._utils.validation import check_int
from lightning_prune.errors import DataError


class GroupAccuracy(Metric):
    """The share of right images in each group; the worst of them tells how a model does where few images are.

    Args:
        num_groups: G.
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_prune.metrics import GroupAccuracy
        >>> metric = GroupAccuracy(num_groups=3)
        >>> metric.update(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]))
        >>> metric.compute()
        tensor([0.5000,    nan, 1.0000])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    right: Tensor
    total: Tensor

    def __init__(self, num_groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_int("num_groups", num_groups, 1)
        self.num_groups = num_groups
        self.add_state("right", default=torch.zeros(num_groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros(num_groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, right: Tensor, groups: Tensor) -> None:
        """Adds images.

        Args:
            right: (B,) bool, whether each is classified right.
            groups: (B,) int, the group of each, from 0 to G - 1.

        Raises:
            DataError: If a number is no group.
        """
        wrong = (groups < 0) | (groups >= self.num_groups)
        if wrong.any():  # the only wait for the device
            raise DataError(f"Groups must be in 0 to {self.num_groups - 1}, got {int(groups[wrong][0])}.")
        self.right.index_add_(0, groups.long(), right.long())
        self.total.index_add_(0, groups.long(), torch.ones_like(groups, dtype=torch.int64))

    def compute(self) -> Tensor:
        """Returns (G,) shares; NaN for a group without images."""
        return torch.where(self.total > 0, self.right / self.total.clamp(min=1), torch.nan)
