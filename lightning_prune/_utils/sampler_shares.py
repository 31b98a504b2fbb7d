"""Finds images that a distributed sampler repeats, because the dataset cannot be divided evenly among the processes."""

from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_prune._utils.trees import tree_flatten


class SamplerShare(NamedTuple):
    """The part of a dataset that one of several processes gets.

    A DistributedSampler assigns the items to the processes in turn. If they cannot be divided evenly, it repeats items
    from the start of the dataset, so that all processes run the same number of batches. Repeated items come last.

    Attributes:
        items: Number of items that this process gets, repeated ones included.
        distinct: Number of items that are not repeated.
        batch_size: Batch size of the loader.
    """

    items: int
    distinct: int
    batch_size: int

    def counted(self, batch_idx: int, size: int) -> int:
        """Number of images at the start of a batch that are not repeated."""
        begin = batch_idx * self.batch_size
        if size != min(self.batch_size, self.items - begin):
            return size  # collated to a different number of images than the sampler provided
        return min(size, max(0, self.distinct - begin))


def share_of(loader: Any) -> SamplerShare | None:
    """This process's share of a loader's dataset; None if no item is repeated, or if it is unknown which ones are.

    Warns in the latter case.
    """
    if not isinstance(loader, DataLoader):
        return None
    batches: Any = loader.batch_sampler
    sampler: Any = getattr(batches, "sampler", loader.sampler)
    if type(sampler) in (DistributedSampler, DistributedSamplerWrapper) and type(batches) is BatchSampler:
        if sampler.total_size <= len(sampler.dataset):
            return None
        distinct = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
        return SamplerShare(len(sampler), distinct, batches.batch_size)
    dataset: Any = loader.dataset
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and hasattr(sampler, "__len__") and hasattr(dataset, "__len__"):
        world = torch.distributed.get_world_size()
        repeated = world * len(sampler) - len(dataset)
        if 0 < repeated < world:
            rank_zero_warn(
                f"{type(sampler).__name__} repeats {repeated} of {len(dataset)} items so that {world} processes get "
                "the same number, and it is unknown in which batches: accuracy and loss count these items twice."
            )
    return None


def shares_of(trainer: L.Trainer) -> list[SamplerShare | None]:
    """The shares of the loaders of a running validation or test."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return [share_of(loader) for loader in tree_flatten(loaders)[0]]
