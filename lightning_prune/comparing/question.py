"""What a comparison asks, exactly: the same question may be answered from what was measured before."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_prune import __version__
from lightning_prune.comparing.entries import Entry


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
    entries: Sequence[Entry],
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


def _contents(entry: Entry) -> Mapping[str, Any]:
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
