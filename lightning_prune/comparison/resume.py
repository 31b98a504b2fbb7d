"""Resuming an interrupted comparison: what of its results is on disk."""

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune._utils.documents import read_document, write_document
from lightning_prune._utils.files import atomic_write, slug
from lightning_prune.comparison.fingerprints import differences, fingerprint_digest
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant
from lightning_prune.comparison.predictions import Predictions
from lightning_prune.errors import ArgumentError, FileFormatError, FileWriteError, PruneError

_VERSION = 2
_FORMATS = {name: f"lightning_prune.comparison.{name}" for name in ("fingerprint", "group", "plan", "variant")}


@dataclass(frozen=True)
class VariantResult:
    """The outcome of validating a variant.

    Attributes:
        metrics: What the module logged.
        images: How many images were validated.
        predictions: The predicted class of each image; None where it is not known.
        missing: Why the predicted or the right classes are not known; empty where they are.
        broken: Why there is no accuracy: which images have outputs that are NaN or infinite; empty where none has.
        values: The metric of each image, where the step returns one and it was asked for; else None.
    """

    metrics: Mapping[str, float]
    images: int
    predictions: Predictions | None
    missing: str = ""
    broken: str = ""
    values: tuple[float, ...] | None = None


class _DamagedError(Exception):
    """A file cannot be read; it counts as missing."""


class ResumeState:
    """What is known of a comparison on disk: `state/<digest of its fingerprint>` in the output folder.

    A comparison with another fingerprint has another folder, so nothing is ever mixed or overwritten. Every file
    appears whole or not at all; those that cannot be read count as missing.

    Args:
        output: The output folder of the comparison.
        fingerprint: The result of `fingerprint_of`.
        resume: Whether to go on from what is known; otherwise it is forgotten.

    Raises:
        ArgumentError: If nothing can be written there.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], resume: bool = True) -> None:
        self.folder = output / "state" / fingerprint_digest(fingerprint)
        self._fingerprint = dict(fingerprint)
        self._others = [path for path in sorted((output / "state").glob("*")) if path != self.folder]
        if not resume and self.folder.exists():
            shutil.rmtree(self.folder)
        self.is_known = self._read("fingerprint") is not None
        try:
            self._write("fingerprint", {"fingerprint": self._fingerprint})
        except FileWriteError as error:
            raise ArgumentError(f"`output` must have a folder `state` that can be written to: {error}") from error
        self._is_full = False  # whether something could not be kept

    def changed_settings(self) -> list[str]:
        """What differs from the most similar comparison in the same folder; empty if this one or none was there."""
        if self.is_known or not self._others:
            return []
        known = [_load(path / "fingerprint.json", "fingerprint") for path in self._others]
        found = [differences(self._fingerprint, values["fingerprint"]) for values in known if values is not None]
        return min(found, key=len, default=[])

    def unreadable(self) -> list[Path]:
        """Folders of other releases, whose comparisons cannot be resumed."""
        return [path for path in self._others if _load(path / "fingerprint.json", "fingerprint") is None]

    def plan(self) -> ComparisonPlan | None:
        """The plan that was kept, or None."""
        values = self._read("plan")
        try:
            return None if values is None else ComparisonPlan.from_dict(values["plan"])
        except (KeyError, TypeError, PruneError):
            return None

    def keep_plan(self, plan: ComparisonPlan) -> None:
        """Keeps the plan."""
        with self._keeping():
            self._write("plan", {"plan": plan.to_dict()})

    def group(self, name: str) -> list[PlannedVariant] | None:
        """The variants that were planned together and kept, or None.

        Args:
            name: Of the group of requests.
        """
        values = self._read(f"groups/{slug(name)}", "group")
        try:
            if values is None or values["group"] != name:
                return None
            return [PlannedVariant.from_dict(each) for each in values["planned"]]
        except (AttributeError, KeyError, TypeError, PruneError):
            return None

    def keep_group(self, name: str, planned: Sequence[PlannedVariant]) -> None:
        """Keeps variants that were planned together, before they are timed with all others.

        Args:
            name: Of the group of requests.
            planned: Its variants.
        """
        with self._keeping():
            values = {"group": name, "planned": [each.to_dict() for each in planned]}
            self._write(f"groups/{slug(name)}", values, "group")

    def summary(self) -> str:
        """What is kept, for a message after an interruption; empty if nothing is."""
        plan = self.plan()
        if plan is None:
            files = sorted((self.folder / "groups").glob("*.json"))
            names = [str(values["group"]) for path in files if (values := _load(path, "group")) is not None]
            what = f"the schedules of {', '.join(names)}" if names else ""
        else:
            names = [planned.variant for planned in plan.planned if planned.timing is not None]
            known = sum(self.result(name) is not None for name in names)
            what = f"the plan and {known} of {len(names)} validated variants"
        return f"Kept in {self.folder}: {what}. The same comparison goes on from there." if what else ""

    def forget_if_nothing_is_kept(self) -> None:
        """Removes the folder where it holds the fingerprint only, as after an error before anything was planned."""
        with suppress(OSError):  # another file is in the folder, or another comparison in that above it
            if [path.name for path in self.folder.iterdir()] == ["fingerprint.json"]:
                shutil.rmtree(self.folder)
                self.folder.parent.rmdir()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """A context in which a full disk does not end the comparison: what is not kept would be done again."""
        try:
            yield
        except FileWriteError as error:
            if not self._is_full:
                warnings.warn(f"After an interruption this comparison would start again: {error}", stacklevel=4)
            self._is_full = True

    def result(self, variant: str) -> VariantResult | None:
        """The result of a variant that was kept, or None."""
        values = self._read(f"variants/{slug(variant)}", "variant")
        try:
            if values is None or values["variant"] != variant:
                return None
            metrics, images = {name: float(value) for name, value in values["metrics"].items()}, int(values["images"])
            predictions = self._predictions(variant, images) if values["has_predictions"] else None
            own = self._values(variant, images) if values.get("has_values") else None
            missing, broken = (str(values.get(name, "")) for name in ("missing", "broken"))
            return VariantResult(metrics, images, predictions, missing, broken, own)
        except (AttributeError, KeyError, TypeError, ValueError, _DamagedError):
            return None

    def keep_result(self, variant: str, result: VariantResult) -> None:
        """Keeps the result of a variant; it counts once its own file is there, which is written last."""
        values = {"variant": variant, "metrics": dict(result.metrics), "images": result.images}
        values |= {"missing": result.missing, "broken": result.broken}
        with self._keeping():
            if result.predictions is not None:
                with atomic_write(self._array(variant)) as temporary, temporary.open("wb") as stream:
                    np.save(stream, np.array(result.predictions, dtype=np.int32))
            if result.values is not None:
                with atomic_write(self._array(variant, ".values")) as temporary, temporary.open("wb") as stream:
                    np.save(stream, np.array(result.values, dtype=np.float64))
            kept = {"has_predictions": result.predictions is not None, "has_values": result.values is not None}
            self._write(f"variants/{slug(variant)}", {**values, **kept}, "variant")

    def _predictions(self, variant: str, images: int) -> Predictions:
        found = _load_array(self._array(variant))
        if found.dtype != np.int32 or found.shape != (2, images):
            raise _DamagedError
        predicted, labels = found.tolist()
        return Predictions(predicted, labels)

    def _values(self, variant: str, images: int) -> tuple[float, ...]:
        found = _load_array(self._array(variant, ".values"))
        if found.dtype != np.float64 or found.shape != (images,):
            raise _DamagedError
        return tuple(found.tolist())

    def _array(self, variant: str, kind: str = "") -> Path:
        return self.folder / "variants" / f"{slug(variant)}{kind}.npy"

    def _read(self, name: str, kind: str | None = None) -> dict[str, Any] | None:
        return _load(self.folder / f"{name}.json", kind or name)

    def _write(self, name: str, values: Mapping[str, Any], kind: str | None = None) -> None:
        head = {"format": _FORMATS[kind or name], "version": _VERSION}
        write_document(self.folder / f"{name}.json", {**head, **dict(values)})


def _load_array(path: Path) -> Any:
    try:
        found = np.load(path, allow_pickle=False)
    except Exception as error:  # of damage numpy makes EOFError, BadZipFile, MemoryError, ...
        raise _DamagedError from error
    if not isinstance(found, np.ndarray):
        raise _DamagedError
    return found


def _load(path: Path, kind: str) -> dict[str, Any] | None:
    try:
        return read_document(path, _FORMATS[kind], _VERSION)
    except FileFormatError:
        return None
