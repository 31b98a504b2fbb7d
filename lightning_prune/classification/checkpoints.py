"""Reads weights files of every usual kind, without pickle, and fits them into a model or says why they do not fit."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import FileFormatError, WeightsError

_SHOWN = 3
# Where training scripts keep the weights in what they save, averaged ones first: those are what was evaluated.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a weights file into a model; where it does not fit, the model stays as it was.

    Args:
        model: The model.
        path: A file as for `read_weights`.

    Raises:
        FileFormatError: The file cannot be read.
        WeightsError: Its keys or shapes differ from the model's.

    Example:
        >>> import timm
        >>> from lightning_prune import zoo
        >>> from lightning_prune.classification.checkpoints import load_weights
        >>> load_weights(timm.create_model(zoo.DIGITS_MODEL), zoo.DIGITS_WEIGHTS)
    """
    expected = model.state_dict()
    found = _unprefixed(read_weights(path), expected)
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    reshaped = [
        f"{key} (model {list(expected[key].shape)}, file {list(found[key].shape)})"
        for key in expected
        if key in found and expected[key].shape != found[key].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)]
    if any(keys for _, keys in problems):
        what = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems if keys)
        raise WeightsError(f"weights: {path} does not fit {type(model).__name__}, of {len(expected)} keys {what}.")
    model.load_state_dict(found)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a weights file onto the CPU.

    Args:
        path: A `.safetensors`, or anything that torch saved: a bare state_dict, a Lightning checkpoint, or what a
            training script saved with the weights under `state_dict`, `model`, `state_dict_ema` or `model_ema`.

    Returns:
        The tensors by key.

    Raises:
        FileFormatError: The file is missing, truncated, holds other things than tensors, or no weights at all.
    """
    source = Path(path)
    if not source.is_file():
        raise FileFormatError(f"weights: expected a file, got {source}, which does not exist or is a folder.")
    try:
        if source.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(source)
        else:
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen kinds, some of their own, for a damaged file
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FileFormatError(
            f"weights: {source} is damaged, or holds more than plain tensors (which is not unpickled): {reason}"
        ) from error
    for holder in _HOLDERS:
        if isinstance(content, Mapping) and isinstance(content.get(holder), Mapping):
            content = content[holder]
            break
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise FileFormatError(f"weights: {source} holds no tensors by name.")
    return tensors


def _unprefixed(found: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Takes off what wrappers put before the keys: torch.compile, DataParallel, and a LightningModule's `model.`."""
    found = {key.replace("_orig_mod.", ""): value for key, value in found.items()}
    for prefix in ("module.", "model."):
        # A model may have a part of that very name; then the prefix is its own. Other parts of a LightningModule
        # (losses, teachers, metrics) lie outside the prefix and are none of the model's.
        if any(key.startswith(prefix) for key in found) and not any(key.startswith(prefix) for key in expected):
            found = {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)}
    return found


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
