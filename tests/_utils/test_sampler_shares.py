"""Repeated images in a batch, compared with the actual output of the samplers."""

from itertools import product
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_prune._utils.sampler_shares import SamplerShare, share_of


def dealt(loaders: list[Any]) -> list[int]:
    """The items that are counted, over all ranks."""
    counted: list[int] = []
    for loader in loaders:
        share = share_of(loader)
        for index, batch in enumerate(loader):
            counted += batch.tolist()[: len(batch) if share is None else share.counted(index, len(batch))]
    return counted


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_item_counts_once(world: int, shuffle: bool) -> None:
    for items, batch_size in product((1, 2, 3, 7, 10, 11, 13), (1, 2, 4, 16)):
        data = torch.arange(items)
        for kind, source in ((DistributedSampler, data), (DistributedSamplerWrapper, SequentialSampler(data))):
            samplers = [kind(source, num_replicas=world, rank=rank, shuffle=shuffle, seed=3) for rank in range(world)]
            loaders = [DataLoader(data, batch_size=batch_size, sampler=sampler) for sampler in samplers]
            assert sorted(dealt(loaders)) == list(range(items)), (kind, items, batch_size)
            assert sum(len(sampler) for sampler in samplers) >= items
        if items >= world:
            even = [UnrepeatedDistributedSampler(data, num_replicas=world, rank=rank) for rank in range(world)]
            assert sorted(dealt([DataLoader(data, batch_size=batch_size, sampler=s) for s in even])) == [*range(items)]


@pytest.mark.parametrize("option", ["drop_last of the loader", "drop_last of the sampler"])
def test_dropped_items_are_not_counted(option: str) -> None:
    data = torch.arange(11)
    drops = {"loader": option.endswith("loader"), "sampler": option.endswith("sampler")}
    samplers = [
        DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False, drop_last=drops["sampler"])
        for rank in range(2)
    ]
    counted = dealt([DataLoader(data, batch_size=4, sampler=s, drop_last=drops["loader"]) for s in samplers])
    assert sorted(counted) == list(range(8 if drops["loader"] else 10))


def test_a_batch_of_unexpected_size_is_counted_completely() -> None:
    share = SamplerShare(items=6, distinct=5, batch_size=4)
    assert [share.counted(0, 4), share.counted(1, 2)] == [4, 1]
    assert [share.counted(1, 4), share.counted(0, 2)] == [4, 2]


@pytest.mark.parametrize(
    "loader",
    [
        [torch.zeros(2)],
        DataLoader(torch.arange(5), batch_size=2),
        DataLoader(torch.arange(6), sampler=DistributedSampler(range(6), 2, 0), batch_size=2),
        DataLoader(torch.arange(5), sampler=DistributedSampler(range(5), 2, 0), batch_size=None),
        DataLoader(torch.arange(5), batch_sampler=BatchSampler(range(5), 2, False)),
    ],
    ids=["no loader", "one process", "even", "no batches", "a list"],
)
def test_loaders_without_repeated_items_have_no_share(loader: Any, recwarn: pytest.WarningsRecorder) -> None:
    assert share_of(loader) is None
    assert not recwarn.list
