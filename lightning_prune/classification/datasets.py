"""Datasets of images: opened by timm, with errors that name the file, and their class names."""

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from torch.utils.data import Dataset

from lightning_prune._utils.validation import is_int
from lightning_prune.errors import DataError

_PARTS = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "test", "testing"}


def open_dataset(root: str, split: str, name: str = "", class_map: str | None = None, **options: Any) -> Dataset[Any]:
    """Opens a folder of images, a tar file, or a dataset by timm's name.

    Args:
        root: The folder or the tar.
        split: Part of the dataset: a subfolder of `root` if it has one of that name, or a split of the dataset.
        name: timm's name of the dataset; empty for a folder or a tar.
        class_map: A text file with one class per line in the order of the head.
        **options: As for `timm.data.create_dataset`.

    Returns:
        The dataset.

    Raises:
        DataError: If `root` or the split does not exist, or there are no images.
    """
    if not name and not Path(root).exists():
        raise DataError(f"`root` must be an existing folder or tar, got {root}.")
    if class_map:
        options["class_map"] = class_map
    # For any other name timm silently opens the test set of a dataset of torchvision.
    if name.lower().startswith("torch/") and split.split("/")[-1] not in _PARTS:
        raise DataError(f"`split` must be one of {', '.join(sorted(_PARTS))} for {name}, got {split!r}.")
    try:
        dataset: Dataset[Any] = create_dataset(name, str(root), split, **options)
    except Exception as error:  # each reader raises other types, including RuntimeError and AssertionError
        reason = str(error) or type(error).__name__
        raise DataError(f"`root` must hold a dataset that timm can open, got {root}: {reason}") from error
    if type(dataset) is ImageDataset:
        dataset = _ReadableImages.of(dataset)
    if isinstance(dataset, Sized) and not len(dataset):
        raise DataError(f"`root` must hold images in one subfolder per class, got {root} with none.")
    # If the split does not exist, timm silently uses the whole root, including training images.
    opened = Path(getattr(getattr(dataset, "reader", None), "root", ""))
    if not name and opened == Path(root) and opened.is_dir():
        folders = sorted(child.name for child in opened.iterdir() if child.is_dir())
        parts = [folder for folder in folders if folder in _PARTS]
        # A class may be called "train", but hardly two of them.
        if len(parts) > 1 or (parts and parts == folders):
            raise DataError(f"`split` must be one of {', '.join(parts)} in {root}, got {split!r}.")
        if split not in _PARTS:
            raise DataError(f"`split` must be the name of a folder in {root}, or left out, got {split!r}.")
    return dataset


class _ReadableImages(ImageDataset):
    """timm's dataset of images, which ends with the name of a file that cannot be read.

    timm takes the next image in its place, so that an accuracy counts that one twice.
    """

    @classmethod
    def of(cls, dataset: ImageDataset) -> "_ReadableImages":
        """The same images, transforms and reader."""
        found = cls.__new__(cls)
        vars(found).update(vars(dataset))
        return found

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """The image, its label (-1 without), and further columns where they were asked for."""
        try:
            file, target, *columns = self.reader[index]
            image = file.read() if self.load_bytes else Image.open(file)
            if self.input_img_mode and not self.load_bytes:
                image = image.convert(self.input_img_mode)  # which decodes all of it
        except Exception as error:  # of damage PIL makes OSError, SyntaxError, ValueError, struct.error, ...
            reason = str(error) or type(error).__name__
            raise DataError(f"`root` must hold images that can be read, got {self._name(index)}: {reason}") from error
        image = image if self.transform is None else self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (image, target) if self.additional_features is None else (image, target, *columns)

    def _name(self, index: int) -> str:
        try:
            return str(self.reader.filename(index, absolute=True))
        except Exception:  # a reader without names of files
            return f"image {index}"


def class_names(dataset: Dataset[Any]) -> dict[int, str] | None:
    """Index -> name of each class of a dataset; None if they are unknown.

    Args:
        dataset: One that `open_dataset` opened, or any that has `classes` or `class_to_idx`, as in torchvision.

    Returns:
        With a class map, the classes in the map, with or without images.
    """
    own = getattr(dataset, "reader", None)
    indices = getattr(own, "class_to_idx", None) or getattr(dataset, "class_to_idx", None)
    if isinstance(indices, Mapping) and indices:
        return {index: str(name) for name, index in indices.items() if is_int(index, 0)}
    names = getattr(dataset, "classes", None)
    return {index: str(name) for index, name in enumerate(names)} if isinstance(names, Sequence) and names else None
