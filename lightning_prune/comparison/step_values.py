"""A metric of each image, as the validation step returns it: variants are then compared image by image."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_prune._utils.sampler_shares import SamplerShare, shares_of
from lightning_prune.callbacks.batches import Extract, batch_shape
from lightning_prune.comparison.predictions import shuffles
from lightning_prune.errors import ArgumentError, DataError


class StepValues(Callback):
    """Collects one number for each image of the first validation loader, in its order, of all processes.

    Args:
        name: The key in the mapping that `validation_step` returns, of a tensor (B,) with one number for each image.
        extract: From a batch to its images, where these are in no usual place.

    Attributes:
        values: Those of the last run.
        is_shuffled: Whether the images came in another order than in other runs, so that no two runs can be paired.
    """

    def __init__(self, name: str, extract: Extract | None = None) -> None:
        self.name, self.extract = name, extract
        self.is_shuffled = False
        self.values: list[float] = []
        self._batches: list[Tensor] = []
        self._share: SamplerShare | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the run before."""
        self.values, self._batches = [], []
        self._share = shares_of(trainer)[0] if shares_of(trainer) else None
        self.is_shuffled = shuffles(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Reads what the step returned.

        Raises:
            ArgumentError: If that holds no number for each image.
            DataError: If a number is not finite.
        """
        if dataloader_idx:
            return
        if not isinstance(outputs, Mapping) or self.name not in outputs:
            keys = ", ".join(map(repr, outputs)) if isinstance(outputs, Mapping) else ""
            got = f"the keys {keys}" if keys else type(outputs).__name__
            raise ArgumentError(
                f"`metric_from_step` must be a key of the mapping that validation_step returns, got {self.name!r}; the "
                f"step returned {got}."
            )
        found = torch.as_tensor(outputs[self.name]).detach().cpu().double()
        shape = batch_shape(batch, self.extract)
        if found.ndim != 1 or (shape is not None and len(found) != shape.images):
            raise ArgumentError(
                f"`metric_from_step` must name one number for each image, a tensor (B,), got a tensor of shape "
                f"{tuple(found.shape)} for {self.name!r}."
            )
        if not found.isfinite().all():
            raise DataError(f"{self.name!r} of batch {batch_idx} must be finite, got {found[~found.isfinite()][0]}.")
        count = len(found) if self._share is None else self._share.counted(batch_idx, len(found))
        self._batches.append(found[:count])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers the values of all processes."""
        own = torch.cat([torch.zeros(0, dtype=torch.float64), *self._batches])
        if trainer.world_size > 1:  # in float32, as some devices have no float64
            own = torch.cat(gather_all_tensors(own.to(pl_module.device, torch.float32)))
        self.values = own.tolist()
