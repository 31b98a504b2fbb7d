"""What the accuracy of a run is estimated by: the setting, or the targets in the batches."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from helpers.data import noise_images

from .tiny import Tiny, brief, validated


@pytest.mark.parametrize(
    ("targets", "proxy", "expected"),
    [
        (torch.arange(8) % 5, "auto", "soft agreement"),
        (torch.eye(5).repeat(2, 1)[:8].roll(1, 1) + torch.eye(5).repeat(2, 1)[:8], "auto", "tag agreement"),
        (torch.linspace(-3, 3, 40).view(8, 5), "auto", "R2"),
        (torch.arange(8) % 5, "cosine", "cosine similarity of features"),
    ],
)
@pytest.mark.usefixtures("clockwork")
def test_targets_or_the_setting_choose_the_proxy(targets, proxy, expected):
    data = DataLoader(TensorDataset(noise_images(8), targets), batch_size=4)
    callback = brief(proxy=proxy)
    validated(callback, Tiny(), data)
    assert callback.decision.plan.proxy == expected


def test_an_unknown_proxy_is_refused():
    with pytest.raises(lp.ArgumentError, match=r"`proxy` must be .*got 'softmax'"):
        lp.TokenPruning(proxy="softmax")
