"""What a comparison has found so far, on disk: an interruption loses no finished variant."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.comparing.outcomes import Outcomes
from lightning_prune.comparing.planned import Decided
from lightning_prune.comparing.question import differences, question_digest
from lightning_prune.comparing.slug import slug
from lightning_prune.errors import ArgumentError, FileFormatError, PruneError
from lightning_prune.files import read_document, replacing, write_document

_VERSION = 1
_KINDS = {name: f"lightning_prune.comparison.{name}" for name in ("question", "decided", "finished")}


@dataclass(frozen=True)
class Finished:
    """A variant that was validated.

    Attributes:
        metrics: What the module logged.
        images: How many were validated.
        outcomes: What was said of each; None where that is not known.
    """

    metrics: Mapping[str, float]
    images: int
    outcomes: Outcomes | None


class _Damaged(Exception):
    """A file that cannot be read; it counts as not there."""


class State:
    """The folder of one question: `state/<digest of the question>` in the output folder.

    Another question has another folder, so nothing is ever mixed or overwritten. Every file appears whole or not at
    all; those that cannot be read count as not there.

    Args:
        output: The output folder of the comparison.
        question: What is asked; see `lightning_prune.comparing.question`.
        fresh: Whether to forget what is known of this question.

    Raises:
        ArgumentError: If nothing can be written there.
    """

    def __init__(self, output: Path, question: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = output / "state" / question_digest(question)
        self._question = dict(question)
        self._others = [path for path in sorted((output / "state").glob("*")) if path != self.folder]
        if fresh and self.folder.exists():
            shutil.rmtree(self.folder)
        self.known = self._read("question") is not None
        try:
            self._write("question", {"question": self._question})
        except OSError as error:
            raise ArgumentError(f"`output` must have a folder `state` that can be written to: {error}") from error

    def news(self) -> list[str]:
        """In what this question differs from the one asked before in the same folder; empty if none was, or this."""
        if self.known or not self._others:
            return []
        asked = [_load(path / "question.json", "question") for path in self._others]
        found = [differences(self._question, values["question"]) for values in asked if values is not None]
        return min(found, key=len, default=[])

    def decided(self) -> Decided | None:
        """What was decided before."""
        values = self._read("decided")
        try:
            return None if values is None else Decided.from_dict(values["decided"])
        except (KeyError, TypeError, PruneError):
            return None

    def keep_decided(self, decided: Decided) -> None:
        """Keeps what was decided."""
        self._write("decided", {"decided": decided.to_dict()})

    def finished(self, variant: str) -> Finished | None:
        """A variant that was validated before."""
        values = self._read(f"rows/{slug(variant)}", "finished")
        try:
            if values is None or values["variant"] != variant:
                return None
            metrics, images = {name: float(value) for name, value in values["metrics"].items()}, int(values["images"])
            return Finished(metrics, images, self._outcomes(variant, images) if values["has_outcomes"] else None)
        except (AttributeError, KeyError, TypeError, ValueError, _Damaged):
            return None

    def keep_finished(self, variant: str, finished: Finished) -> None:
        """Keeps a variant that was validated; the row is there once its own file is, which is written last."""
        if finished.outcomes is not None:
            with replacing(self._array(variant)) as temporary, temporary.open("wb") as stream:
                np.save(stream, np.array(finished.outcomes, dtype=np.int32))
        values = {"variant": variant, "metrics": dict(finished.metrics), "images": finished.images}
        self._write(f"rows/{slug(variant)}", {**values, "has_outcomes": finished.outcomes is not None}, "finished")

    def _outcomes(self, variant: str, images: int) -> Outcomes:
        try:
            found = np.load(self._array(variant), allow_pickle=False)
        except Exception as error:  # of damage numpy makes EOFError, BadZipFile, MemoryError, ...
            raise _Damaged from error
        if not isinstance(found, np.ndarray) or found.dtype != np.int32 or found.shape != (2, images):
            raise _Damaged
        predicted, labels = found.tolist()
        return Outcomes(predicted, labels)

    def _array(self, variant: str) -> Path:
        return self.folder / "rows" / f"{slug(variant)}.npy"

    def _read(self, name: str, kind: str | None = None) -> dict[str, Any] | None:
        return _load(self.folder / f"{name}.json", kind or name)

    def _write(self, name: str, values: Mapping[str, Any], kind: str | None = None) -> None:
        write_document(
            self.folder / f"{name}.json", {"format": _KINDS[kind or name], "version": _VERSION, **dict(values)}
        )


def _load(path: Path, kind: str) -> dict[str, Any] | None:
    try:
        return read_document(path, _KINDS[kind], _VERSION)
    except FileFormatError:
        return None
