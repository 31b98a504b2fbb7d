"""LightningDataModules for image folders, archives, timm's datasets and the embedded digits."""

from typing import Any

from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader

from lightning_prune._utils.files import user_path
from lightning_prune._utils.validation import check, check_bool, check_path
from lightning_prune.classification.datasets import class_names, open_dataset
from lightning_prune.classification.digits import CANVAS, CLASSES, ClutteredDigits, EpochSampler
from lightning_prune.classification.evaluation_data import EvaluationData, PreparedData
from lightning_prune.errors import DataError


class ImageFolderData(PreparedData):
    """Any dataset that `timm.data.create_dataset` reads, with the preprocessing of the model.

    A folder with a subfolder per class (ImageNet's layout, with or without a `val` or `validation` above the classes),
    a tar of such a folder, or, with `dataset`, one of torchvision, Hugging Face, TFDS or WebDataset. Size, crop,
    interpolation and normalisation are those of the model's data config.

    Args:
        root: The folder or the tar.
        split: Part of the dataset: a subfolder of `root` if it has one of that name, or a split of the dataset.
        dataset: timm's name of the dataset, such as "torch/cifar10" or "hfds/<owner>/<name>"; empty for a folder
            or a tar.
        batch_size: Number of images per batch.
        num_workers: Number of processes that load images; 0 loads in the main process. None for 4, or as many as there
            are usable cores where these are fewer.
        class_map: A text file with one class per line in the order of the head, if that is not alphabetical.
        data_config: Entries of timm's data config: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`. What is
            not given is taken from the attribute `data_config` of the LightningModule that the trainer runs.
        download: Whether a named dataset may be downloaded into `root`.

    Attributes:
        preprocessing: The data config that is used, after `setup`; it is printed, and is among the hyperparameters.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: In `setup`: if `root` or the split does not exist or has no images, if no data config is known, or
            if the numbers of classes of data and model differ.

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
        num_workers: int | None = None,
        class_map: str | None = None,
        data_config: dict[str, Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, data_config)
        check_path("root", root)
        check("split", split, "a name", isinstance(split, str))
        check("dataset", dataset, "a name", isinstance(dataset, str))
        if class_map is not None:
            check_path("class_map", class_map)
        check_bool("download", download)
        check("download", download, "False without the name of a `dataset`", bool(dataset) or not download)
        self.root = str(user_path(root))
        self.split = split
        self.dataset_name = dataset
        self.class_map = None if class_map is None else str(user_path(class_map))
        self.download = download
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Opens the dataset and checks that it fits the model.

        Args:
            stage: "validate", "test", "predict" or "fit"; the data are the same.
        """
        config = self.prepare()
        options: dict[str, Any] = {"input_img_mode": "L"} if config["input_size"][0] == 1 else {}
        options |= {"batch_size": self.batch_size, "transform": create_transform(**config, is_training=False)}
        options |= {"download": True} if self.download else {}
        self.dataset = open_dataset(self.root, self.split, self.dataset_name, self.class_map, **options)
        names, head = class_names(self.dataset), self.of_model("num_classes")
        if names is not None and head is not None and len(names) != head:
            raise DataError(
                f"`root` must have the {head} classes of the model's head, got {self.root} with {len(names)}. Give a "
                "model trained on these classes, or a `class_map` with those of the head."
            )


class DigitsData(EvaluationData):
    """The embedded digits: real scans on cluttered canvases, 1 x 56 x 56, without a download.

    Validation, test and prediction use the 500 held-out scans, each in several placements; training uses the other
    1,297, in new placements every epoch.

    Args:
        batch_size: Number of images per batch.
        num_workers: Number of processes that render images; 0 renders in the main process, which takes 1 ms per image.
        placements: Number of placements of each held-out scan; 4 give 2,000 images.
        seed: Seed of places, sizes and clutter. It does not change which scans are held out.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: In `setup`: if the model expects images of another size or has another number of classes.

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
        """Checks that the model fits the digits.

        Args:
            stage: "validate", "test", "predict" or "fit"; the check is the same.
        """
        size = tuple((self.of_model("data_config") or {}).get("input_size", (1, CANVAS, CANVAS)))
        if size != (1, CANVAS, CANVAS):
            raise DataError(
                f"`model` must take images of 1 x {CANVAS} x {CANVAS} for DigitsData, got {' x '.join(map(str, size))}."
            )
        head = self.of_model("num_classes")
        if head not in (None, CLASSES):
            raise DataError(f"`model` must have {CLASSES} classes for DigitsData, got {head}.")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training scans, shuffled, in new placements every epoch; the short last batch is dropped."""
        digits = ClutteredDigits("train", seed=self.seed)
        return self.loader(digits, sampler=EpochSampler(len(digits), self.seed), drop_last=True)
