"""Images of batches: their shape, and calibration images that are sampled without touching the running loader."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset

from lightning_prune._utils.batch_keys import IMAGE_KEYS, LABEL_KEYS
from lightning_prune._utils.random_state import preserve_generators_of
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune._utils.trees import tree_flatten
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.errors import ArgumentError, DataError

Extract = Callable[[Any], Tensor]

_SAMPLING_SHARE = 0.25  # of the time limit
_SHORTEST_SAMPLING = 1.0  # seconds; less would be left to chance
_IMAGES_FROM_LOADER = 512  # images taken from a loader that was passed as `calibration`

# Class names, because pytorch_lightning has copies of Lightning's classes.
_SAMPLER_SOURCES = {  # samplers that visit every item of a source -> their attribute that holds the source
    "SequentialSampler": "data_source",
    "RandomSampler": "data_source",
    "DistributedSampler": "dataset",
    "UnrepeatedDistributedSampler": "dataset",
}
_SAMPLER_WRAPPERS = ("DistributedSamplerWrapper", "UnrepeatedDistributedSamplerWrapper")
_SAMPLER_PACKAGES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(repr(key) for key in list(value)[:8])}"
    if isinstance(value, list | tuple):
        name, types = type(value).__name__, ", ".join(type(item).__name__ for item in value[:4])
        return f"a {name} of {types}" if types else f"an empty {name}"
    return f"of type {type(value).__name__}"


def _guess_images(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[key] for key in IMAGE_KEYS if key in batch), None)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and batch:
        return batch[0]
    return batch


def images_from_batch(batch: Any, extract: Extract | None = None) -> Tensor:
    """Returns the images of a batch: the batch itself, its first element, or its entry of a usual name.

    Args:
        batch: What the loader yields. The entries are `image`, `images`, `pixel_values` and `inputs`.
        extract: A function from a batch to its images, which is used instead.

    Returns:
        (B, C, H, W), floating point.

    Raises:
        ArgumentError: If there are none; names `images_from_batch`, the argument to pass.
    """
    images = extract(batch) if extract is not None else _guess_images(batch)
    if isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point():
        return images
    if extract is not None:
        raise ArgumentError(f"`images_from_batch` must return float images (B, C, H, W), got {_describe(images)}.")
    raise ArgumentError(
        f"Found no images in the batch, which is {_describe(batch)}. Pass `images_from_batch=`, a function from a "
        f"batch to its images (B, C, H, W)."
    )


def targets_from_batch(batch: Any) -> Tensor | None:
    """Returns the targets of a batch: its second element, or its entry of a usual name; None without.

    Args:
        batch: What the loader yields. The entries are `label`, `labels`, `target` and `targets`.

    Returns:
        (B, ...) of any type.
    """
    if isinstance(batch, Mapping):
        targets = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    else:
        targets = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    return targets if isinstance(targets, Tensor) and targets.ndim else None


def labels_from_batch(batch: Any) -> Tensor | None:
    """Returns the labels of a batch, (B,) integers: its targets, if they are that; else None."""
    targets = targets_from_batch(batch)
    return targets if targets is not None and targets.ndim == 1 and not targets.is_floating_point() else None


class BatchShape(NamedTuple):
    """What a measured latency is valid for: the number of images in a batch, their height and width."""

    images: int
    height: int
    width: int

    def difference(self, other: "BatchShape") -> str | None:
        """How another batch differs from this one, as the rest of a sentence about it; None if it does not."""
        if other.images != self.images:
            return f"has {other.images} images; the profile was made at a batch size of {self.images}"
        if other != self:
            size, profiled = (f"{shape.height} x {shape.width}" for shape in (other, self))
            return f"has images of {size}; the profile was made for {profiled}"
        return None


def batch_shape(batch: Any, extract: Extract | None) -> BatchShape | None:
    """The shape of a batch; None where its images cannot be found, which must not end a run."""
    try:
        shape = images_from_batch(batch, extract).shape
    except Exception:
        return None
    return BatchShape(shape[0], shape[2], shape[3])


class Calibration(NamedTuple):
    """Images on which the accuracy of schedules is estimated.

    Attributes:
        images: (images, C, H, W), on the CPU.
        labels: (images,) int64, or None where the batches hold none.
        source: Where they come from, for the panel.
        targets: (B, ...) of the first batch of the loop, in any form; None where it holds none.
    """

    images: Tensor
    labels: Tensor | None
    source: str
    targets: Tensor | None = None


def _class_name(sampler: Any) -> str:
    """Name of a sampler's class if it is one of PyTorch or Lightning, else "": a user's sampler may do anything."""
    kind = type(sampler)
    return kind.__name__ if kind.__module__.split(".")[0] in _SAMPLER_PACKAGES else ""


def _visits_all(sampler: Any, dataset: Any) -> bool:
    """Whether a sampler visits the whole dataset, on all ranks together."""
    while _class_name(sampler) in _SAMPLER_WRAPPERS:
        sampler = getattr(sampler.dataset, "_sampler", None)
    source: Any = getattr(sampler, _SAMPLER_SOURCES.get(_class_name(sampler), ""), None)
    return hasattr(source, "__len__") and hasattr(dataset, "__len__") and len(source) == len(dataset)


def sampling_loader(loaders: Any, count: int, seed: int) -> DataLoader[Any] | None:
    """A loader of a random sample of the first dataset, in random order, with its collation and no workers.

    Args:
        loaders: The loop's loaders, in any nesting.
        count: Items of the sample; all if there are fewer.
        seed: Of the sample.

    Returns:
        None where the dataset cannot be indexed, the loader makes no batches, or its sampler may skip items: the sample
        would hold what the loop never sees.
    """
    flat = tree_flatten(getattr(loaders, "iterables", loaders))[0]
    loader = flat[0] if flat else None
    if not isinstance(loader, DataLoader):
        return None
    batches = getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)  # Lightning wraps it in predict
    if type(batches) is not BatchSampler or not _visits_all(batches.sampler, loader.dataset):
        return None
    dataset: Any = loader.dataset
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    subset: Subset[Any] = Subset(dataset, chosen.tolist())
    return DataLoader(subset, batch_size=batches.batch_size, collate_fn=loader.collate_fn, num_workers=0)


def _same_structure(sampled: Any, first: Any) -> bool:
    """Whether a sampled batch has the structure of the loop's, which may join several loaders (CombinedLoader)."""
    if isinstance(first, Mapping):
        return isinstance(sampled, Mapping) and set(sampled) == set(first)
    if isinstance(first, list | tuple):
        return isinstance(sampled, list | tuple) and [*map(type, sampled)][:1] == [*map(type, first)][:1]
    return isinstance(sampled, type(first))


def _transferred(trainer: L.Trainer, pl_module: L.LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches as a step receives them: in the trainer's precision, on its device, through the user's hooks."""
    datamodule: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
    hooks: L.LightningDataModule | L.LightningModule = pl_module
    if datamodule is not None:
        # The base class of this datamodule, which may be that of pytorch_lightning.
        base = next(kind for kind in type(datamodule).__mro__ if kind.__name__ == "DataHooks")
        hooks = datamodule if is_overridden("on_before_batch_transfer", datamodule, base) else pl_module
    for batch in batches:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = hooks.on_before_batch_transfer(batch, 0)
        yield trainer.strategy.batch_to_device(batch, device=pl_module.device, dataloader_idx=0)


def _join(
    batches: Iterable[Any], count: int | None, extract: Extract | None, is_late: Callable[[], bool] = lambda: False
) -> tuple[Tensor, Tensor | None]:
    """Up to `count` images and, if every batch has them, their labels; no further batch is read when it is late."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        images.append(images_from_batch(batch, extract).cpu())
        batch_labels = labels_from_batch(batch)
        if batch_labels is not None:
            labels.append(batch_labels.cpu())
        if (count is not None and sum(map(len, images)) >= count) or is_late():
            break
    if not images:
        raise DataError("`calibration` must yield images, got none.")
    sizes = {tuple(part.shape[1:]) for part in images}
    if len(sizes) > 1:
        raise DataError(f"`calibration` must have images of one size, got {sorted(sizes)}.")
    joined = torch.cat(images)[:count]
    known = torch.cat(labels)[:count] if len(labels) == len(images) else None
    return joined, known if known is not None and len(known) == len(joined) else None


def calibration_images(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    loaders: Any,
    first_batch: Any,
    config: PruningConfig,
    calibration: int | Tensor | Iterable[Any],
    minimum: int = 0,
    limit: TimeLimit | None = None,
) -> Calibration:
    """Samples the first dataset of a loop by a loader of its own, so that the running loader loses no batch.

    Args:
        trainer: Its precision and device are used.
        pl_module: Its batch-transfer hooks are applied, as in the loop.
        loaders: The loop's loaders, in any nesting.
        first_batch: The first batch of the loop, used where the dataset cannot be sampled.
        config: Its `images_from_batch` and `seed` are used.
        calibration: How many images to sample, or the images themselves, or a loader of batches.
        minimum: How many images there are at least, if the dataset has as many.
        limit: Sampling ends early when a quarter of the time that is left has passed, but not within a second; None
            for no limit.

    Raises:
        ArgumentError: If there are no images in a batch.
        DataError: If there are no batches, or images of several sizes.
    """
    extract, targets = config.images_from_batch, targets_from_batch(first_batch)
    if isinstance(calibration, Tensor):
        images = images_from_batch(trainer.precision_plugin.convert_input(calibration)).cpu()
        return Calibration(images, None, f"{len(images)} images given", targets)
    if not isinstance(calibration, int):
        batches = _transferred(trainer, pl_module, calibration)
        count = max(_IMAGES_FROM_LOADER, minimum)
        return Calibration(*_join(batches, count, extract), "the loader given as `calibration`", targets)
    count = max(calibration, minimum)
    deadline = float("inf")
    if limit is not None and not minimum:
        deadline = limit.clock() + max(_SAMPLING_SHARE * limit.left(), _SHORTEST_SAMPLING)
    loader = sampling_loader(loaders, count, config.seed)
    problem = "the dataset cannot be sampled"
    if loader is not None:
        try:
            with preserve_generators_of((loader.dataset, loader.collate_fn)):
                sampled = _transferred(trainer, pl_module, loader)
                begin = next(sampled, None)
                if begin is not None and _same_structure(begin, first_batch):
                    is_late = (lambda: False) if limit is None else (lambda: limit.clock() >= deadline)
                    images, labels = _join(chain([begin], sampled), count, extract, is_late)
                    source = f"{len(images)} images sampled from the dataset, seed {config.seed}"
                    if is_late() and len(images) < count:
                        source += f"; there was no time to load {count}"
                    return Calibration(images, labels, source, targets)
        except Exception as error:  # of the user's dataset, which the run itself may never read there
            problem = f"sampling the dataset failed ({type(error).__name__}: {error})"
            rank_zero_warn(f"The accuracy is estimated on the first batch alone, since {problem}.")
    return Calibration(*_join([first_batch], None, extract), f"the first batch, since {problem}", targets)
