"""Which images of a batch are repeated, where several processes share a dataset that does not come out even."""

from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_prune._utils.trees import tree_flatten


class SamplerShare(NamedTuple):
    """What one process gets of a dataset that is dealt out to several.

    A DistributedSampler deals the items out in turn, and repeats some from the start where they do not come out even,
    so that all processes run as many batches. The repeated ones stand at the end.

    Attributes:
        items: Items that this process gets, repeated ones included.
        distinct: How many of them are not repeated.
        batch_size: Of the loader.
    """

    items: int
    distinct: int
    batch_size: int

    def counted(self, batch_idx: int, size: int) -> int:
        """How many images at the start of a batch count; the others are repeated."""
        begin = batch_idx * self.batch_size
        if size != min(self.batch_size, self.items - begin):
            return size  # collated to other images than the sampler dealt out
        return min(size, max(0, self.distinct - begin))


def share_of(loader: Any) -> SamplerShare | None:
    """This process's share of a loader's dataset; None where nothing is repeated, or that cannot be said.

    The latter is told by a warning, where the number of items suggests that some are repeated.
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
                "as many each, and in which batches cannot be said: accuracy and loss count them twice."
            )
    return None


def shares_of(trainer: L.Trainer) -> list[SamplerShare | None]:
    """The shares of the loaders that a running validation or test goes through."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return [share_of(loader) for loader in tree_flatten(loaders)[0]]
