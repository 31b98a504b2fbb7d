"""Reads weights files of all common formats without pickle, and loads them into a model."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.classification.hugging_face import Problems, is_hugging_face, renamed
from lightning_prune.errors import FileFormatError, WeightsError

_SHOWN = 3  # keys in an error message
# Keys under which training scripts save weights. Averaged weights come first, because their accuracy is reported.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Files in a folder that `save_pretrained` of Hugging Face wrote. An index maps keys to files.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a weights file into a model. If it does not fit, the model is not changed.

    If all keys of the model are in the file under one prefix, as in `net.head.weight` for `head.weight`, the prefix is
    removed, with a warning. Keys without it belong to other parts (losses, teachers, metrics) and are left out.

    Args:
        model: The model. For one of Hugging Face transformers, keys of older versions are renamed as
            `from_pretrained` does.
        path: See `read_weights`.

    Raises:
        FileFormatError: If the file cannot be read.
        WeightsError: If its keys or shapes differ from those of the model, or it holds several models that fit.

    Example:
        >>> import timm
        >>> from lightning_prune.classification.checkpoints import load_weights
        >>> from lightning_prune.classification.demo_models import DIGITS_MODEL, DIGITS_WEIGHTS
        >>> load_weights(timm.create_model(DIGITS_MODEL), DIGITS_WEIGHTS)
    """
    expected = model.state_dict()
    found = _unprefixed(read_weights(path), expected, path)
    problems = _problems(expected, found)
    if any(keys for _, keys in problems) and is_hugging_face(model):
        found, problems = renamed(model, found)
    if any(keys for _, keys in problems):
        counts = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems if keys)
        name = type(model).__name__
        raise WeightsError(f"`weights` must have the {len(expected)} keys of {name}, got {path} with {counts}.")
    model.load_state_dict(found)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a weights file onto the CPU.

    Args:
        path: A `.safetensors`, or anything that torch saved: a bare state_dict, a Lightning checkpoint, or what a
            training script saved with the weights under `state_dict`, `model`, `state_dict_ema` or `model_ema`. Or a
            folder that `save_pretrained` of Hugging Face wrote, or the index of its files.

    Returns:
        The tensors by key.

    Raises:
        FileFormatError: If the file is missing or truncated, or holds no tensors or other objects.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        held = next((source / name for name in _FOLDER_FILES if (source / name).is_file()), None)
        if held is None:
            raise FileFormatError(f"`weights` must be a file, or a folder with {_FOLDER_FILES[0]}, got {source}.")
        source = held
    if not source.is_file():
        begins = f" Relative paths, also of a config file, begin in the working folder, {Path.cwd()}."
        raise FileFormatError(
            f"`weights` must be an existing file, got {source}.{'' if source.is_absolute() else begins}"
        )
    if source.name.endswith(".index.json"):
        return _read_parts(source)
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


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Reads the files that an index of Hugging Face names."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"`weights` must be a valid index of files of tensors, got {index}: {error!r}") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_weights(index.parent / Path(str(name)).name)  # never a file outside the folder
    return tensors


def _problems(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Problems:
    """What keeps tensors from being loaded: keys that are missing, unexpected, or of tensors of another shape."""
    reshaped = [
        f"{key} (model {tuple(expected[key].shape)}, file {tuple(found[key].shape)})"
        for key in expected
        if key in found and expected[key].shape != found[key].shape
    ]
    return [
        ("missing", [key for key in expected if key not in found]),
        ("unexpected", [key for key in found if key not in expected]),
        ("with another shape", reshaped),
    ]


def _unprefixed(found: dict[str, Tensor], expected: Iterable[str], path: str | Path) -> dict[str, Tensor]:
    """Removes the prefix under which a file holds the keys of a model, and leaves out the other keys."""
    keys = set(expected)
    bare = {key.replace("_orig_mod.", ""): value for key, value in found.items()}  # of torch.compile
    prefix = _common_prefix(bare, keys, path)
    kept = {key.removeprefix(prefix): value for key, value in bare.items() if key.startswith(prefix)}
    left_out = [key for key in bare if not key.startswith(prefix)]
    if prefix and (prefix != "model." or left_out):  # a checkpoint of an ImageClassifier is no surprise
        others = f"; {len(left_out)} without it are left out: {_some(left_out)}" if left_out else ""
        rank_zero_warn(f"The prefix '{prefix}' of {len(kept)} keys in {path} is removed{others}.")
    return kept


def _common_prefix(found: Iterable[str], expected: set[str], path: str | Path) -> str:
    """The prefix with which most keys of a model are in a file; empty if they are there without one.

    A prefix of most keys is enough, so that an error about the others names them without it.

    Raises:
        WeightsError: If all keys of the model are there under several prefixes.
    """
    counts: Counter[str] = Counter()
    for name in found:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    complete = [prefix for prefix, count in counts.items() if count == len(expected)]
    if "" in complete:
        return ""
    known = [prefix for prefix in complete if not prefix.replace("module.", "").replace("model.", "")]
    if len(complete) > 1 and len(known) != 1:
        raise WeightsError(
            f"`weights` must hold one model that fits, got {path} with {len(complete)}, under the prefixes "
            f"{', '.join(complete)}. Save one of them alone."
        )
    if complete:
        return (known or complete)[0]
    most, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return most if 2 * count > len(expected) else ""


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
