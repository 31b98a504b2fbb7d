"""Estimates of accuracy on disk: what a schedule, or one block, costs in accuracy is measured once for some weights."""

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.errors import FileFormatError
from lightning_prune.profiling.accuracy_proxy import Estimate
from lightning_prune.profiling.environment import unknown_conditions
from lightning_prune.profiling.model_identity import UNKNOWN, method_identity
from lightning_prune.profiling.store_folder import StoreFolder
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class StoreTuning:
    """Constants of the store.

    Attributes:
        max_files: Files in the folder, one for some weights and images; the oldest are deleted.
        checked_outputs: Outputs of an image that are compared with those of the dense model when it was measured.
        max_deviation: Share of the largest output by which they may differ.
    """

    max_files: int = 64
    checked_outputs: int = 32
    max_deviation: float = 0.01


_TUNING = StoreTuning()
_FORMAT, _VERSION = "lightning_prune.accuracy_estimates", 1
_PREFIX = "accuracy-"


class KeptSensitivity(NamedTuple):
    """The sensitivity of blocks to a method, as it was measured.

    Attributes:
        table: (blocks, counts) mean divergence of an image.
        images: Number of images.
        seconds: Time that the measurement had; infinite without a limit.
    """

    table: list[list[float]]
    images: int
    seconds: float


class AccuracyStore:
    """Estimates of accuracy of one model with its weights, on some calibration images: one file of a folder.

    Each estimate is found again by its method, with class and settings, and by what was removed where. As the code of a
    model may change while its structure stays, nothing is found before `check` has compared outputs of the dense model
    with those of the earlier run.

    Args:
        dependencies: As `accuracy_dependencies` returns them. If one is unknown, nothing is kept, which a warning says.
        folder: As `lightning_prune.profiling.ProfileStore` takes it.
    """

    def __init__(self, dependencies: Mapping[str, Any], folder: str | Path | None = None) -> None:
        names = ("estimates of accuracy", "estimate of accuracy")
        self._dependencies, self._folder = dependencies, StoreFolder(folder, _FORMAT, _VERSION, names)
        self._entries: dict[str, Any] = {}
        self._image_counts: list[int] = []
        self._outputs: list[list[float]] | None = None
        self._replaces, self._warned = False, set[str]()
        self._warn_unknown(unknown_conditions(dependencies))
        self._file = self._folder.file(dependencies, _PREFIX)

    def check(self, outputs: Tensor) -> bool:
        """Reads what is kept, if the dense model says what it said when that was measured.

        Args:
            outputs: (B, K) outputs of the dense model for the first calibration images.

        Returns:
            Whether there is anything that can be used.
        """
        self._outputs, self._entries = outputs[:, : _TUNING.checked_outputs].double().tolist(), {}
        self._image_counts = []
        document = self._read()
        if document is None:
            return False
        try:
            before = torch.tensor(document["outputs"], dtype=torch.float64)
            now = torch.tensor(self._outputs, dtype=torch.float64)
            tolerance = _TUNING.max_deviation * float(before.abs().max())
            same = before.shape == now.shape and float((before - now).abs().max()) <= tolerance
            entries = dict(document["entries"])
            counts = sorted({int(images) for key in entries if (images := json.loads(key).get("images")) is not None})
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):  # not as it was written
            same = False
        self._replaces = not same
        if same:
            self._entries, self._image_counts = entries, counts
        return bool(self._entries)

    def image_counts(self) -> list[int]:
        """Numbers of calibration images on which schedules were measured, ascending."""
        return self._image_counts

    def estimate(self, reduction: Reduction | None, schedule: Schedule, images: int) -> Estimate | None:
        """The kept estimate of a schedule; None if it is not known.

        Args:
            reduction: The method; None if the schedule names one for each block.
            schedule: Tokens removed in each block.
            images: Number of calibration images, the first ones.
        """
        value = self._entries.get(_key(_methods(reduction, schedule), removed=list(schedule.removed), images=images))
        try:
            return None if value is None else Estimate(*map(float, value))
        except (TypeError, ValueError):
            return None

    def keep_estimate(self, reduction: Reduction | None, schedule: Schedule, images: int, estimate: Estimate) -> None:
        """Keeps an estimate.

        Args:
            reduction: The method; None if the schedule names one for each block.
            schedule: Tokens removed in each block.
            images: Number of calibration images.
            estimate: What was measured.
        """
        place = {"removed": list(schedule.removed), "images": images}
        self._keep(_methods(reduction, schedule), list(estimate), **place)

    def sensitivity(self, reduction: Reduction, blocks: Sequence[int], counts: Sequence[int]) -> KeptSensitivity | None:
        """The kept sensitivity of blocks; None if it is not known.

        Args:
            reduction: The method.
            blocks: The measured blocks.
            counts: Tokens that leave the block.
        """
        value = self._entries.get(_key([reduction], blocks=list(blocks), counts=list(counts)))
        try:
            found = None if value is None else KeptSensitivity(**value)
            shape = None if found is None else torch.tensor(found.table).shape
        except (TypeError, ValueError):
            return None
        return found if shape == (len(blocks), len(counts)) else None

    def keep_sensitivity(
        self, reduction: Reduction, blocks: Sequence[int], counts: Sequence[int], found: KeptSensitivity
    ) -> None:
        """Keeps the sensitivity of blocks.

        Args:
            reduction: The method.
            blocks: The measured blocks.
            counts: Tokens that leave the block.
            found: What was measured.
        """
        self._keep([reduction], found._asdict(), blocks=list(blocks), counts=list(counts))

    def _keep(self, methods: Sequence[Reduction], value: Any, **place: Any) -> None:
        """Keeps a value, together with what other processes have kept meanwhile."""
        if self._file is None or self._outputs is None:
            return
        unknown = [method for method in methods if UNKNOWN in method_identity(method).values()]
        if unknown:
            self._warn_unknown([f"the settings of {unknown[0].name}"])
            return
        self._entries[_key(methods, **place)] = value
        document = None if self._replaces else self._read()
        others = {} if document is None else document.get("entries", {})
        values = {"outputs": self._outputs, "entries": {**others, **self._entries}}
        if document is None:
            self._make_room()
        if self._folder.save(self._file, self._dependencies, values) is None:
            self._file = None  # a full disk is said once
        self._replaces = False

    def _read(self) -> dict[str, Any] | None:
        if self._file is None:
            return None
        try:
            return self._folder.load(self._file, self._dependencies)
        except (FileFormatError, OSError) as error:
            self._folder.warn_unreadable(error)
            return None

    def _make_room(self) -> None:
        """Deletes the files that were written longest ago."""
        if self._folder.path is None:
            return
        with suppress(OSError):  # of a folder that cannot be searched, or a file that another process has deleted
            files = sorted(self._folder.path.glob(f"{_PREFIX}*.json"), key=lambda file: file.stat().st_mtime)
            for file in files[: max(len(files) + 1 - _TUNING.max_files, 0)]:
                file.unlink(missing_ok=True)

    def _warn_unknown(self, unknown: Sequence[str]) -> None:
        what = ", ".join(unknown)
        if what and what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                f"Estimates of accuracy are measured every time and not kept: {what} cannot be compared with those of "
                "another run.",
                stacklevel=6,
            )


def _methods(reduction: Reduction | None, schedule: Schedule) -> list[Reduction]:
    """The method, or that of each reducing block if the schedule names several."""
    return [reduction] if reduction is not None else [resolve(spec) for spec in schedule.methods.values()]


def _key(methods: Sequence[Reduction], **place: Any) -> str:
    identities = [method_identity(method) for method in methods]
    own = identities[0] if len(identities) == 1 else {"methods": identities}
    return json.dumps({**own, **place}, sort_keys=True)
