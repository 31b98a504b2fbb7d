"""Images out of batches: their shape, and calibration images sampled from the data of a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset

from lightning_prune._utils.trees import tree_flatten
from lightning_prune.errors import ArgumentError, DataError

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


Extract = Callable[[Any], Tensor]
_IMAGE_KEYS = ("image", "images", "pixel_values", "inputs")
_LABEL_KEYS = ("label", "labels", "target", "targets")
_FROM_LOADER = 512  # images taken from a loader that was passed as `calibration`


class Calibration(NamedTuple):
    """Images to judge pruning by.

    Attributes:
        images: (images, channels, height, width), on the CPU.
        labels: (images,) int64, or None where the batches hold none.
        source: Where they come from, for the panel.
    """

    images: Tensor
    labels: Tensor | None
    source: str


def images_from_batch(batch: Any, extract: Extract | None = None) -> Tensor:
    """The images of a batch: itself, its first element, or its `image`, `images`, `pixel_values` or `inputs`.

    Args:
        batch: What the loader yields.
        extract: The user's own way, tried instead.

    Returns:
        (B, channels, height, width), floating point.

    Raises:
        ArgumentError: If there are none; names `images_from_batch`, which helps.
    """
    found = extract(batch) if extract is not None else _guess(batch)
    if isinstance(found, Tensor) and found.ndim == 4 and found.is_floating_point():
        return found
    if extract is not None:
        raise ArgumentError(f"`images_from_batch` must return float images (B, C, H, W), got {_describe(found)}.")
    raise ArgumentError(
        f"Found no images in the batch, which is {_describe(batch)}. Pass `images_from_batch=`, a function from a "
        f"batch to its images (B, C, H, W)."
    )


def labels_from_batch(batch: Any) -> Tensor | None:
    """The labels of a batch: its second element or its entry `label`, `labels`, `target`, `targets`; None without."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    fits = isinstance(found, Tensor) and found.ndim == 1 and not found.is_floating_point()
    return found if fits else None


def calibration_images(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    loaders: Any,
    calibration: int | Tensor | Iterable[Any],
    first: Any,
    extract: Extract | None = None,
    seed: int = 0,
    least: int = 0,
) -> Calibration:
    """A seeded sample of the first validation dataset, through a loader of our own; never through the running one.

    Args:
        trainer: Gives precision and device.
        pl_module: Its batch-transfer hooks are applied, as in the loop.
        loaders: The loop's loaders, in any nesting.
        calibration: How many images to sample, or the images themselves, or a loader of batches.
        first: The first batch of the loop, used where the dataset cannot be sampled.
        extract: See `images_from_batch`.
        seed: Of the sample.
        least: How many images to take at any rate, where there are as many.

    Raises:
        ArgumentError: If there are no images in a batch.
        DataError: If there are no batches, or images of several sizes.
    """
    if isinstance(calibration, Tensor):
        images = images_from_batch(trainer.precision_plugin.convert_input(calibration)).cpu()
        return Calibration(images, None, f"{len(images)} images given")
    if not isinstance(calibration, int):
        batches = _transferred(trainer, pl_module, calibration)
        return Calibration(*_gather(batches, max(_FROM_LOADER, least), extract), "the loader given as `calibration`")
    count = max(calibration, least)
    loader = sampled_loader(loaders, count, seed)
    sampled = iter(()) if loader is None else _transferred(trainer, pl_module, loader)
    begin = next(sampled, None)
    if begin is None or not _same_form(begin, first):
        return Calibration(*_gather([first], None, extract), "the first batch, since the dataset cannot be sampled")
    images, labels = _gather(chain([begin], sampled), count, extract)
    return Calibration(images, labels, f"{len(images)} images sampled from the dataset, seed {seed}")


def _guess(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and batch:
        return batch[0]
    return batch


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(repr(key) for key in list(value)[:8])}"
    if isinstance(value, list | tuple):
        kind, held = type(value).__name__, ", ".join(type(v).__name__ for v in value[:4])
        return f"a {kind} of {held}" if held else f"an empty {kind}"
    return f"of type {type(value).__name__}"


def _same_form(sampled: Any, first: Any) -> bool:
    """Whether a batch is like the loop's: that may draw each from several loaders (a CombinedLoader's other modes)."""
    if isinstance(first, Mapping):
        return isinstance(sampled, Mapping) and set(sampled) == set(first)
    if isinstance(first, list | tuple):
        return isinstance(sampled, list | tuple) and [*map(type, sampled)][:1] == [*map(type, first)][:1]
    return isinstance(sampled, type(first))


def _transferred(trainer: L.Trainer, pl_module: L.LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches as the loop hands them to a step: in the precision, on the device, through the user's hooks."""
    datamodule: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
    hooks: L.LightningDataModule | L.LightningModule = pl_module
    if datamodule is not None:
        # Its own base class, which may be that of pytorch_lightning.
        base = next(kind for kind in type(datamodule).__mro__ if kind.__name__ == "DataHooks")
        hooks = datamodule if is_overridden("on_before_batch_transfer", datamodule, base) else pl_module
    for batch in batches:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = hooks.on_before_batch_transfer(batch, 0)
        yield trainer.strategy.batch_to_device(batch, device=pl_module.device, dataloader_idx=0)


def _gather(batches: Iterable[Any], count: int | None, extract: Extract | None) -> tuple[Tensor, Tensor | None]:
    """Up to `count` images and, if every batch has them, their labels."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        images.append(images_from_batch(batch, extract).cpu())
        found = labels_from_batch(batch)
        if found is not None:
            labels.append(found.cpu())
        if count is not None and sum(map(len, images)) >= count:
            break
    if not images:
        raise DataError("`calibration` yielded no images.")
    sizes = {tuple(part.shape[1:]) for part in images}
    if len(sizes) > 1:
        raise DataError(f"The calibration images are of several sizes, {sorted(sizes)}; pass `calibration=` with one.")
    together = torch.cat(images)[:count]
    known = torch.cat(labels)[:count] if len(labels) == len(images) else None
    return together, known if known is not None and len(known) == len(together) else None


class BatchShape(NamedTuple):
    """The form of a batch: images, their height and their width."""

    images: int
    height: int
    width: int

    def difference(self, other: "BatchShape") -> str | None:
        """How another batch differs, as the end of a sentence that begins with it; None where it does not."""
        if other.images != self.images:
            return f"has {other.images} images; the profile was made at a batch size of {self.images}"
        if other != self:
            now, then = (f"{form.height} x {form.width}" for form in (other, self))
            return f"has images of {now}; the profile was made for {then}"
        return None


def batch_shape(batch: Any, extract: Extract | None) -> BatchShape | None:
    """The form of a batch; None where that cannot be said, which is no reason to end a run."""
    try:
        shape = images_from_batch(batch, extract).shape
    except Exception:
        return None
    return BatchShape(shape[0], shape[2], shape[3])
