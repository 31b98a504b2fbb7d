"""LightningDataModules for image folders, archives, timm's datasets and the embedded digits."""

from collections.abc import Sized
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset

from lightning_prune.classification.digits import CANVAS, CLASSES, ClutteredDigits, EpochSampler
from lightning_prune.errors import ArgumentError, DataError

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


class _EvaluationData(L.LightningDataModule):
    """One dataset that is validated, tested and predicted on, whole and in order."""

    dataset: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ArgumentError(f"batch_size: expected at least 1, got {batch_size}")
        if num_workers < 0:
            raise ArgumentError(f"num_workers: expected 0 or more, got {num_workers}")
        self.batch_size = batch_size
        self.num_workers = num_workers

    def _loader(self, dataset: Dataset[Any], **kwargs: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,  # by name: Lightning rebuilds the loader for predict and DDP and sets it again
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of (images [batch, channels, height, width], labels [batch]), in the order of the dataset."""
        return self._loader(self.dataset)

    def test_dataloader(self) -> DataLoader[Any]:
        """The same batches as for validation."""
        return self._loader(self.dataset)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same batches as for validation, labels included."""
        return self._loader(self.dataset)

    def _of_model(self, name: str) -> Any:
        """An attribute of the LightningModule that the trainer runs; None without a trainer or such an attribute."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, name, None)


class ImageFolderData(_EvaluationData):
    """Any dataset that `timm.data.create_dataset` reads, prepared as the model at hand wants to see it.

    That is a folder with a subfolder per class (ImageNet's own layout, with or without a `val` or `validation` above
    the classes), a tar of such a folder, or by `dataset` one of torchvision, Hugging Face, TFDS or WebDataset. Size,
    crop, interpolation and normalisation come from the model's data config, so nobody has to know them.

    Args:
        root: The folder or the tar.
        split: Which part: a subfolder of `root` where there is one of that name, or the dataset's own.
        dataset: timm's name of the dataset, such as "torch/cifar10" or "hfds/<owner>/<name>"; empty for a folder
            or a tar.
        batch_size: Images per batch.
        num_workers: Processes that load images; 0 loads in the main one.
        class_map: A text file with one class per line in the order of the head, where that is not alphabetical.
        data_config: timm's data config to use. By default the attribute `data_config` of the LightningModule that the
            trainer runs, which `ImageClassifier` reads off the `pretrained_cfg` of its model.
        download: Whether a dataset by name may be fetched into `root` where it is not there yet.

    Raises:
        ArgumentError: An argument is out of its range.
        DataError: In `setup`: nothing there, no images or no such split, no way to know what the model wants to see,
            or not as many classes as the model's head has.

    Example:
        >>> from lightning_prune import ImageFolderData
        >>> data = ImageFolderData("imagenet", split="validation", batch_size=4)
        >>> data.batch_size
        4
    """

    def __init__(
        self,
        root: str,
        split: str = "validation",
        dataset: str = "",
        batch_size: int = 16,
        num_workers: int = 4,
        class_map: str | None = None,
        data_config: dict[str, Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if download and not dataset:
            raise ArgumentError("download: a folder or a tar cannot be fetched; give the dataset's name by `dataset`.")
        self.root = root
        self.split = split
        self.dataset_name = dataset
        self.class_map = class_map
        self.data_config = data_config
        self.download = download
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Opens the dataset and checks that it fits the model.

        Args:
            stage: "validate", "test", "predict" or "fit"; all the same here.
        """
        config = self.data_config or self._of_model("data_config")
        if not config:
            raise DataError(
                "data_config: expected one to be given, or the LightningModule to have one (ImageClassifier has it "
                "where its model has a pretrained_cfg), got neither, so size and normalisation of the images are "
                "unknown."
            )
        options: dict[str, Any] = {"input_img_mode": "L"} if config["input_size"][0] == 1 else {}
        options |= {"batch_size": self.batch_size, "transform": create_transform(**config, is_training=False)}
        options |= {"download": True} if self.download else {}
        self.dataset = open_dataset(self.root, self.split, self.dataset_name, self.class_map, **options)
        classes, head = class_count(self.dataset), self._of_model("num_classes")
        if classes is not None and head is not None and classes != head:
            raise DataError(
                f"{self.root}: {classes} classes, but the model's head has {head}. Give the model that was trained on "
                "these classes, or a class_map that names those of the head."
            )


class DigitsData(_EvaluationData):
    """The embedded digits: real scans on cluttered canvases, 1 x 56 x 56, without any download.

    Validation, test and prediction show the 500 held-out scans, each in several placements; training shows the other
    1,297, in fresh placements every epoch.

    Args:
        batch_size: Images per batch.
        num_workers: Processes that draw images; 0 draws in the main one, which takes a millisecond per image.
        placements: How often each held-out scan is shown; 4 make 2,000 images.
        seed: Of places, sizes and clutter. It does not change which scans are held out.

    Raises:
        ArgumentError: An argument is out of its range.
        DataError: In `setup`: the model says that it is for other images, or its head is for another number of
            classes.

    Example:
        >>> from lightning_prune import DigitsData
        >>> data = DigitsData(batch_size=8)
        >>> data.setup("validate")
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> images.shape
        torch.Size([8, 1, 56, 56])
    """

    def __init__(self, batch_size: int = 16, num_workers: int = 0, placements: int = 4, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        self.seed = seed
        self.dataset = ClutteredDigits("held_out", placements, seed)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Checks that the model is one for digits.

        Args:
            stage: "validate", "test", "predict" or "fit"; all the same here.
        """
        size = tuple((self._of_model("data_config") or {}).get("input_size", (1, CANVAS, CANVAS)))
        if size != (1, CANVAS, CANVAS):
            raise DataError(
                f"digits: images are 1 x {CANVAS} x {CANVAS}, but the model expects {' x '.join(map(str, size))}."
            )
        head = self._of_model("num_classes")
        if head not in (None, CLASSES):
            raise DataError(f"digits: {CLASSES} classes, but the model's head has {head}.")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training scans, shuffled, in fresh placements every epoch; the odd last batch is dropped."""
        digits = ClutteredDigits("train", seed=self.seed)
        return self._loader(digits, sampler=EpochSampler(len(digits), self.seed), drop_last=True)
