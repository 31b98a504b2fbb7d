"""LightningDataModules for evaluation: complete, in order, with the preprocessing of the model."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lightning_prune._utils.processor import usable_cores
from lightning_prune._utils.validation import check, check_int
from lightning_prune.classification.preprocessing import complete_config, describe_config

_MOST_WORKERS = 4  # by default


class EvaluationData(L.LightningDataModule):
    """A dataset for validation, test and prediction, complete and in order."""

    dataset: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int | None) -> None:
        super().__init__()
        check_int("batch_size", batch_size, 1, "a number of images")
        if num_workers is None:
            num_workers = min(_MOST_WORKERS, usable_cores())
        check_int("num_workers", num_workers, 0, "a number of processes")
        self.batch_size = batch_size
        self.num_workers = num_workers

    def loader(self, dataset: Dataset[Any], **kwargs: Any) -> DataLoader[Any]:
        """A loader of the batches of a dataset.

        Args:
            dataset: Its images.
            **kwargs: Further arguments of the loader.
        """
        return DataLoader(
            dataset,
            batch_size=self.batch_size,  # by keyword, because Lightning rebuilds the loader for predict and DDP
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of images `(B, C, H, W)` and labels `(B,)`, in the order of the dataset."""
        return self.loader(self.dataset)

    def test_dataloader(self) -> DataLoader[Any]:
        """The same batches as for validation."""
        return self.loader(self.dataset)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same batches as for validation, labels included."""
        return self.loader(self.dataset)

    def of_model(self, name: str) -> Any:
        """An attribute of the LightningModule that the trainer runs; None if there is no trainer or no attribute."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, name, None)


class PreparedData(EvaluationData):
    """Evaluation data whose images are prepared as the model expects them.

    Args:
        batch_size: Number of images per batch.
        num_workers: Number of processes that load images; 0 loads in the main process. None for 4, or as many as there
            are usable cores where these are fewer.
        data_config: Entries of timm's data config. What is not given is taken from the attribute `data_config` of the
            LightningModule that the trainer runs.

    Attributes:
        preprocessing: The data config that is used, after `setup`; it is printed, and is among the hyperparameters.
    """

    def __init__(self, batch_size: int, num_workers: int | None, data_config: dict[str, Any] | None) -> None:
        super().__init__(batch_size, num_workers)
        check("data_config", data_config, "a mapping or None", data_config is None or isinstance(data_config, Mapping))
        self.data_config = data_config
        self.preprocessing: dict[str, Any] = {}

    def config_for(self, module: Any) -> tuple[dict[str, Any], bool]:
        """The data config that is used with a LightningModule, and whether its mean and std are unknown, and 0.5.

        Raises:
            DataError: If the size of the images is unknown.
        """
        return complete_config(getattr(module, "data_config", None), self.data_config)

    def prepare(self) -> dict[str, Any]:
        """The data config that is used with the trainer's LightningModule; printed where it is another than before.

        Raises:
            DataError: If the size of the images is unknown.
        """
        config, unknown = self.config_for(self.trainer.lightning_module if self.trainer is not None else None)
        if unknown:
            rank_zero_warn(
                "Mean and std of the images are unknown, and 0.5 is used: save the image processor to the folder of "
                "the model, or give `mean` and `std` in `data_config`."
            )
        if config != self.preprocessing:
            self.preprocessing = self.hparams["data_config"] = config
            if self.trainer is None or self.trainer.is_global_zero:
                print(f"Images: {describe_config(config)}")
        return config
