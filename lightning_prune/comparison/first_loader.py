"""The first of several validation loaders, so that all figures of a row are of the same images."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import lightning as L
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_HOOKS = ("validation_step", "on_validation_batch_start", "on_validation_batch_end")


class FirstLoader:
    """Validates a module on the first of its validation loaders only.

    Lightning runs several loaders one after another. A module may log one accuracy for all of them, whereas images are
    compared in pairs on one. A module whose hooks need a `dataloader_idx` cannot run with one loader: it keeps
    all, and so does a `CombinedLoader`.

    Args:
        module: The module.
        data: A LightningDataModule, the validation loaders, or None for those of the module.

    Attributes:
        loaders: How many there are, after the first run.

    Example:
        >>> from lightning import LightningModule
        >>> from lightning_prune.comparison.first_loader import FirstLoader
        >>> first = FirstLoader(LightningModule(), [["a batch"], ["another"]])
        >>> with first.arguments() as arguments:
        ...     arguments
        {'dataloaders': ['a batch']}
        >>> first.note
        'of the first of 2 validation loaders'
    """

    def __init__(self, module: L.LightningModule, data: Any) -> None:
        self.module, self.data, self.loaders = module, data, 1

    @property
    def note(self) -> str:
        """A remark on the figures; empty where there is one loader, or all are run."""
        return f"of the first of {self.loaders} validation loaders" if self.loaders > 1 else ""

    @contextmanager
    def arguments(self) -> Iterator[dict[str, Any]]:
        """The data as `Trainer.validate` takes them, within the context; afterwards nothing is changed."""
        own = "datamodule" if isinstance(self.data, L.LightningDataModule) else "dataloaders"
        if _needs_index(self.module):
            yield {own: self.data}
        elif own == "dataloaders" and self.data is not None:
            yield {own: self._first_of(self.data)}
        else:
            source = self.module if self.data is None else self.data
            had = "val_dataloader" in vars(source)
            before: Callable[[], Any] = source.val_dataloader

            @wraps(before)  # by which Lightning sees whether the user has written it
            def val_dataloader() -> Any:
                return self._first_of(before())

            vars(source)["val_dataloader"] = val_dataloader
            try:
                yield {own: self.data}
            finally:
                del vars(source)["val_dataloader"]
                if had:
                    vars(source)["val_dataloader"] = before

    def _first_of(self, loaders: Any) -> Any:
        if isinstance(loaders, CombinedLoader):  # the user chose how it combines them
            return loaders
        found = CombinedLoader(loaders, "sequential").flattened
        if len(found) < 2:
            return loaders
        if self.loaders == 1:
            rank_zero_warn(
                f"There are {len(found)} validation loaders, and all figures of the comparison are of the first."
            )
        self.loaders = len(found)
        return found[0]


def _needs_index(module: L.LightningModule) -> bool:
    """Whether a hook has a `dataloader_idx` without default, which Lightning refuses where there is one loader."""
    parameters = [inspect.signature(getattr(module, hook)).parameters.get("dataloader_idx") for hook in _HOOKS]
    return any(found is not None and found.default is found.empty for found in parameters)
