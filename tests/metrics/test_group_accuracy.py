"""The accuracy of each group, against a loop."""

from typing import Any

import pytest
import torch

from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.metrics import GroupAccuracy


def test_shares_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    metric, seen = GroupAccuracy(4), []
    for size in (7, 1, 12):
        right = torch.rand(size, generator=generator) > 0.4
        groups = torch.randint(0, 3, (size,), generator=generator)
        metric.update(right, groups)
        seen += list(zip(right.tolist(), groups.tolist(), strict=True))
    expected = [
        sum(r for r, g in seen if g == k) / sum(g == k for _, g in seen) if any(g == k for _, g in seen) else None
        for k in range(4)
    ]
    found = metric.compute().tolist()
    assert found[:3] == pytest.approx(expected[:3])
    assert expected[3] is None
    assert found[3] != found[3]  # NaN


@pytest.mark.parametrize("group", [-1, 2])
def test_a_number_must_be_a_group(group: int) -> None:
    with pytest.raises(DataError, match=f"0 to 1, got {group}"):
        GroupAccuracy(2).update(torch.tensor([True]), torch.tensor([group]))


def test_there_must_be_groups() -> None:
    with pytest.raises(ArgumentError, match="num_groups"):
        GroupAccuracy(0)


@pytest.mark.long
def test_two_ranks_count_each_image_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["groups"]
        assert found["val/top1"] == pytest.approx(4 / 7)
        assert (found["val/group_small"], found["val/group_large"]) == pytest.approx((2 / 3, 2 / 4))
        assert found["val/group_empty"] != found["val/group_empty"]  # NaN
        assert found["val/worst_group"] == pytest.approx(2 / 4)
        assert found["val/worst_group_images"] == 4
