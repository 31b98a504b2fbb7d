"""Opens whatever timm can read, with errors that say what is wrong."""

from collections.abc import Sized
from pathlib import Path
from typing import Any

from timm.data.dataset_factory import create_dataset
from torch.utils.data import Dataset

from lightning_prune.errors import DataError

_PARTS = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "test", "testing"}


def open_dataset(root: str, split: str, name: str = "", class_map: str | None = None, **options: Any) -> Dataset[Any]:
    """Opens a folder of images, a tar, or a dataset by timm's name.

    Args:
        root: The folder or the tar.
        split: Which part: a subfolder of `root` where there is one of that name, or the dataset's own.
        name: timm's name of the dataset; empty for a folder or a tar.
        class_map: A text file with one class per line in the order of the head.
        **options: As for `timm.data.create_dataset`.

    Returns:
        The dataset.

    Raises:
        DataError: Nothing is there, it has no images, or no such part.
    """
    if not name and not Path(root).exists():
        raise DataError(f"root: expected a folder or a tar with images, got {root}, which does not exist.")
    if class_map:
        options["class_map"] = class_map
    try:
        dataset: Dataset[Any] = create_dataset(name, str(root), split, **options)
    except Exception as error:  # every reader has its own kinds, bare RuntimeError and assert among them
        raise DataError(f"{root}: no dataset could be opened: {error or type(error).__name__}") from error
    if isinstance(dataset, Sized) and not len(dataset):
        raise DataError(f"{root}: expected images in one subfolder per class, got none.")
    # For a part that is not there timm takes the whole root: training images would be validated on, unsaid.
    taken = Path(getattr(getattr(dataset, "reader", None), "root", ""))
    if not name and taken == Path(root) and taken.is_dir():
        parts = sorted(child.name for child in taken.iterdir() if child.is_dir())
        if parts and set(parts) <= _PARTS:  # a class may be called "train", but hardly all of them
            raise DataError(f"split: expected one of {', '.join(parts)}, which {root} has, got {split!r}.")
    return dataset


def class_count(dataset: Dataset[Any]) -> int | None:
    """Counts the classes of a dataset; None where it does not say.

    Args:
        dataset: One that `open_dataset` opened.

    Returns:
        Number of classes. With a class map it is that of the map, whether or not all of them have images.
    """
    names = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or getattr(dataset, "classes", None)
    return len(names) if names else None
