"""Resuming an interrupted comparison."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune import __version__
from lightning_prune._utils.files import atomic_write, read_document, slug, write_document
from lightning_prune._utils.trees import tree_flatten, tree_leaves
from lightning_prune.comparison.predictions import Outcomes
from lightning_prune.comparison.variants import ComparisonPlan, VariantRequest
from lightning_prune.errors import ArgumentError, FileFormatError, PruneError


def digest(value: Tensor) -> str:
    """A digest of shape, dtype and every bit of a tensor."""
    return hashlib.sha256(_bytes_of(value)).hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """A digest of every parameter and buffer that a checkpoint would hold, names, shapes and dtypes included."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(_bytes_of(value) if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()[:32]


def data_identity(loaders: Any, batch: Any, limit: int | float | None) -> dict[str, Any]:
    """What tells one set of validation data from another: its kind, its size, and its first batch to the bit.

    Args:
        loaders: The loop's loaders, in any nesting.
        batch: The first batch, as the step receives it.
        limit: The trainer's `limit_val_batches`.
    """
    found = tree_flatten(getattr(loaders, "iterables", loaders))[0]
    datasets = [getattr(loader, "dataset", loader) for loader in found]
    first = hashlib.sha256()
    for leaf in tree_leaves(batch):
        first.update(_bytes_of(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return {
        "datasets": [type(dataset).__name__ for dataset in datasets],
        "items": [_length(dataset) for dataset in datasets],
        "limit_val_batches": limit,
        "first_batch": first.hexdigest()[:32],
    }


def ask(
    *,
    weights: str,
    data: Mapping[str, Any],
    context: Mapping[str, Any],
    entries: Sequence[VariantRequest],
    speedups: Sequence[float],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The question as plain values.

    Args:
        weights: What `weights_digest` says.
        data: What `data_identity` says.
        context: Device, batch, precision and versions.
        entries: What is compared.
        speedups: The targets.
        settings: Whatever else the answer depends on.
    """
    methods = {entry.name: _contents(entry) for entry in entries}
    question = {
        "weights": weights,
        "data": dict(data),
        **dict(context),
        "methods": {name: {key: _told(value) for key, value in given.items()} for name, given in methods.items()},
        "speedups": list(speedups),
        **dict(settings),
        "lightning_prune": __version__,
    }
    return dict(json.loads(json.dumps(question)))  # as it will be read back


def question_digest(question: Mapping[str, Any]) -> str:
    """A name for the question."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The entries in which two questions differ."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def _contents(entry: VariantRequest) -> Mapping[str, Any]:
    """What a method is; not its settings, which may name a file (a vocabulary) that was written anew meanwhile."""
    if entry.searches:
        return {"searched": entry.searched}
    return {} if entry.reduction is None else vars(entry.reduction)


def _length(dataset: Any) -> int | None:
    """How many items a dataset has; None where it does not know, as a stream whose `__len__` raises."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _told(value: Any) -> str:
    """A setting as text; of a tensor everything, where `repr` would leave out its middle."""
    return digest(value) if isinstance(value, Tensor) else repr(value)


def _bytes_of(value: Tensor) -> bytes:
    head = f"{tuple(value.shape)} {value.dtype}".encode()
    try:
        flat = value.detach().cpu().contiguous().reshape(-1)
        return head + flat.view(torch.uint8).numpy().tobytes() if flat.numel() else head
    except (RuntimeError, TypeError):  # subclasses have no bytes of their own: by what they stand for, nothing left out
        return head + value.detach().float().cpu().contiguous().reshape(-1).numpy().tobytes()


_VERSION = 1
_KINDS = {
    name: f"lightning_prune.comparison.objective_comparison.{name}" for name in ("question", "decided", "finished")
}


@dataclass(frozen=True)
class VariantResult:
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
        question: What is asked; see `lightning_prune.comparison.resume`.
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

    def decided(self) -> ComparisonPlan | None:
        """What was decided before."""
        values = self._read("decided")
        try:
            return None if values is None else ComparisonPlan.from_dict(values["decided"])
        except (KeyError, TypeError, PruneError):
            return None

    def keep_decided(self, decided: ComparisonPlan) -> None:
        """Keeps what was decided."""
        self._write("decided", {"decided": decided.to_dict()})

    def finished(self, variant: str) -> VariantResult | None:
        """A variant that was validated before."""
        values = self._read(f"rows/{slug(variant)}", "finished")
        try:
            if values is None or values["variant"] != variant:
                return None
            metrics, images = {name: float(value) for name, value in values["metrics"].items()}, int(values["images"])
            return VariantResult(metrics, images, self._outcomes(variant, images) if values["has_outcomes"] else None)
        except (AttributeError, KeyError, TypeError, ValueError, _Damaged):
            return None

    def keep_finished(self, variant: str, finished: VariantResult) -> None:
        """Keeps a variant that was validated; the row is there once its own file is, which is written last."""
        if finished.outcomes is not None:
            with atomic_write(self._array(variant)) as temporary, temporary.open("wb") as stream:
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
