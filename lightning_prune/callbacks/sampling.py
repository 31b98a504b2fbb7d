"""Which loaders can be sampled without asking them: those that go through the whole of their dataset."""

from typing import Any

import torch
from torch.utils._pytree import tree_flatten
from torch.utils.data import BatchSampler, DataLoader, Subset

# By name, as pytorch_lightning has copies of Lightning's own.
_SOURCES = {  # samplers that go through the whole of something -> their attribute that holds it
    "SequentialSampler": "data_source",
    "RandomSampler": "data_source",
    "DistributedSampler": "dataset",
    "UnrepeatedDistributedSampler": "dataset",
}
_WRAPPERS = ("DistributedSamplerWrapper", "UnrepeatedDistributedSamplerWrapper")
_MAKERS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")


def sampled_loader(loaders: Any, count: int, seed: int) -> DataLoader[Any] | None:
    """A loader over a random sample of the first dataset, with its collation and no workers.

    Args:
        loaders: The loop's loaders, in any nesting.
        count: Items of the sample; all where there are fewer.
        seed: Of the sample.

    Returns:
        None where the dataset cannot be indexed, the loader makes no batches, or it has a sampler that may pass over
        items: the sample would hold what the loop never sees.
    """
    flat = tree_flatten(getattr(loaders, "iterables", loaders))[0]
    loader = flat[0] if flat else None
    if not isinstance(loader, DataLoader):
        return None
    batches = getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)  # Lightning wraps it in predict
    if type(batches) is not BatchSampler or not _visits_all(batches.sampler, loader.dataset):
        return None
    dataset: Any = loader.dataset
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    subset: Subset[Any] = Subset(dataset, chosen.tolist())
    return DataLoader(subset, batch_size=batches.batch_size, collate_fn=loader.collate_fn, num_workers=0)


def _visits_all(sampler: Any, dataset: Any) -> bool:
    """Whether a sampler goes through the whole dataset, on all ranks together."""
    while _known(sampler) in _WRAPPERS:
        sampler = getattr(sampler.dataset, "_sampler", None)
    source: Any = getattr(sampler, _SOURCES.get(_known(sampler), ""), None)
    return hasattr(source, "__len__") and hasattr(dataset, "__len__") and len(source) == len(dataset)


def _known(sampler: Any) -> str:
    """The name of a sampler's class, where it is one of PyTorch's or Lightning's: those of users do as they like."""
    kind = type(sampler)
    return kind.__name__ if kind.__module__.split(".")[0] in _MAKERS else ""
