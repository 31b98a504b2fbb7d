"""Reads weights files of all common formats without pickle, and loads them into a model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import FileFormatError, WeightsError

_SHOWN = 3  # keys in an error message
# Keys under which training scripts save weights. Averaged weights come first, because their accuracy is reported.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a weights file into a model. If it does not fit, the model is not changed.

    Args:
        model: The model.
        path: See `read_weights`.

    Raises:
        FileFormatError: If the file cannot be read.
        WeightsError: If its keys or shapes differ from those of the model.

    Example:
        >>> import timm
        >>> from lightning_prune.classification.checkpoints import load_weights
        >>> from lightning_prune.classification.demo_models import DIGITS_MODEL, DIGITS_WEIGHTS
        >>> load_weights(timm.create_model(DIGITS_MODEL), DIGITS_WEIGHTS)
    """
    expected = model.state_dict()
    found = _unprefixed(read_weights(path), expected)
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    reshaped = [
        f"{key} (model {tuple(expected[key].shape)}, file {tuple(found[key].shape)})"
        for key in expected
        if key in found and expected[key].shape != found[key].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("with another shape", reshaped)]
    if any(keys for _, keys in problems):
        counts = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems if keys)
        name = type(model).__name__
        raise WeightsError(f"`weights` must have the {len(expected)} keys of {name}, got {path} with {counts}.")
    model.load_state_dict(found)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a weights file onto the CPU.

    Args:
        path: A `.safetensors`, or anything that torch saved: a bare state_dict, a Lightning checkpoint, or what a
            training script saved with the weights under `state_dict`, `model`, `state_dict_ema` or `model_ema`.

    Returns:
        The tensors by key.

    Raises:
        FileFormatError: If the file is missing or truncated, or holds no tensors or other objects.
    """
    source = Path(path)
    if not source.is_file():
        raise FileFormatError(f"`weights` must be an existing file, got {source}.")
    try:
        if source.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(source)
        else:
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many types for damaged files
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FileFormatError(
            f"`weights` must be a valid file of tensors (nothing else is unpickled), got {source}: {reason}"
        ) from error
    for holder in _HOLDERS:
        if isinstance(content, Mapping) and isinstance(content.get(holder), Mapping):
            content = content[holder]
            break
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise FileFormatError(f"`weights` must hold tensors by name, got {source}.")
    return tensors


def _unprefixed(found: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Removes key prefixes of wrappers: torch.compile, DataParallel, and `model.` of a LightningModule."""
    found = {key.replace("_orig_mod.", ""): value for key, value in found.items()}
    for prefix in ("module.", "model."):
        # The prefix stays if the model has a submodule of that name. Keys without the prefix belong to other parts of a
        # LightningModule (losses, teachers, metrics) and are left out.
        if any(key.startswith(prefix) for key in found) and not any(key.startswith(prefix) for key in expected):
            found = {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)}
    return found


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
