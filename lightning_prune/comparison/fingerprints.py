"""What the results of a comparison depend on, as plain values: its fingerprint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_prune import __version__
from lightning_prune._utils.digests import tensor_bytes, tensor_digest
from lightning_prune._utils.documents import SavedDocument
from lightning_prune._utils.trees import tree_flatten, tree_leaves
from lightning_prune.comparison.requests import VariantRequest


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
        first.update(tensor_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    digests = [digest for dataset in datasets if isinstance(digest := getattr(dataset, "digest", None), str)]
    return {
        **({"digests": digests} if digests else {}),  # of datasets that know what they hold
        "datasets": [type(dataset).__name__ for dataset in datasets],
        "items": [_length(dataset) for dataset in datasets],
        "limit_val_batches": limit,
        "first_batch": first.hexdigest()[:32],
    }


def fingerprint_of(
    *,
    weights: str,
    data: Mapping[str, Any],
    conditions: Mapping[str, Any],
    requests: Sequence[VariantRequest],
    speedups: Sequence[float],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the results of a comparison depend on, as plain values.

    Args:
        weights: The result of `weights_digest`.
        data: The result of `data_identity`.
        conditions: Everything that the latency of the dense model depends on: the result of `model_conditions`.
        requests: What is compared.
        speedups: The targets.
        settings: All other settings.
    """
    fingerprint = {
        "weights": weights,
        "data": dict(data),
        **dict(conditions),
        "methods": {request.name: _contents(request) for request in requests},
        "speedups": list(speedups),
        **dict(settings),
        "lightning_prune": __version__,
    }
    return dict(json.loads(json.dumps(fingerprint)))  # as it will be read back


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """A short name for a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The entries in which two fingerprints differ."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def _contents(request: VariantRequest) -> dict[str, Any]:
    """What a request is; not the settings of its method, which may name a file whose content has changed meanwhile."""
    found: dict[str, Any] = {}
    if request.searches:
        found["searched"] = repr(request.searched)
    elif request.reduction is not None:
        found |= {key: _text_of(value) for key, value in vars(request.reduction).items()}
    if request.objective is not None:
        objective = request.objective
        found["objective"] = f"{type(objective).__module__}.{type(objective).__qualname__}"
        found |= {f"objective.{key}": _text_of(value) for key, value in vars(objective).items()}
    if request.tail is not None:
        found["tail"] = request.tail
    if request.schedule is not None:
        schedule = request.schedule
        found["schedule"] = schedule.to_dict() if isinstance(schedule, SavedDocument) else repr(schedule)
    return found


def _length(dataset: Any) -> int | None:
    """How many items a dataset has; None where it does not know, as a stream whose `__len__` raises."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _text_of(value: Any) -> str:
    """A setting as text; of a tensor everything, where `repr` would leave out its middle."""
    return tensor_digest(value) if isinstance(value, Tensor) else repr(value)
