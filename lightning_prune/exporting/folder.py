"""The folder of an exported model: written whole or not at all, with what is needed to use the model."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_prune._utils.files import naming_file
from lightning_prune._utils.validation import check, check_path
from lightning_prune.classification.preprocessing import data_config_of
from lightning_prune.errors import ArgumentError, FileFormatError, FileWriteError
from lightning_prune.exporting.image_input import ImageInput

PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Entries of a data config that say how images are prepared."""


def check_new(output: Any, overwrite: bool) -> None:
    """Raises ArgumentError unless `output` is a new or empty folder, or may be replaced."""
    check_path("output", output)
    target = Path(output)
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"`output` must be a folder, got {output}, which is a file.")
    if target.exists() and not overwrite and any(target.iterdir()):
        raise ArgumentError(
            f"`output` must be a new or empty folder, got {output}, which holds files. `overwrite` replaces it."
        )


@contextmanager
def new_folder(output: Any, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder next to `output`, which becomes `output` at the end; an error leaves nothing.

    Args:
        output: The folder; it may exist if it is empty.
        overwrite: Whether an existing folder is replaced.

    Raises:
        ArgumentError: If it exists and is not to be replaced, or cannot be created.
        FileWriteError: If a file cannot be written, for example on a full disk; names it as it would be in `output`.
    """
    check_new(output, overwrite)
    target = Path(output).absolute()
    created = [each for each in target.parents if not each.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ArgumentError(f"`output` must be a folder that can be created, got {output}: {error}") from error
    try:
        try:
            with naming_file(target):
                yield stage
                stage.chmod(0o777 & ~_umask())  # mkdtemp creates private folders
                _replace(stage, target)
        except FileWriteError as error:
            raise FileWriteError(str(error).replace(str(stage), str(target))) from error
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):  # a folder with something in it stays
            for each in created:
                each.rmdir()
        raise


def _replace(stage: Path, target: Path) -> None:
    """Renames a folder to one that may exist; the old one is deleted when the new one is in its place."""
    if not target.exists():
        stage.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    target.rename(old / target.name)
    try:
        stage.rename(target)
    except BaseException:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_sample(folder: Path, images: Tensor, expected: Tensor) -> None:
    """Writes a batch of real images and the outputs of PyTorch in float32."""
    with (folder / "sample.npz").open("wb") as file:
        np.savez(file, images=images.cpu().numpy(), expected=expected.cpu().numpy())


def check_data_config(config: object) -> None:
    """Raises ArgumentError unless the argument `preprocessing` is None or has known entries only."""
    valid = config is None or (isinstance(config, Mapping) and set(config) <= set(PREPROCESSING))
    check("preprocessing", config, f"None or a mapping with some of {', '.join(PREPROCESSING)}", valid)


def data_config(model: nn.Module, root: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """How images are prepared, as far as that is known.

    Args:
        model: It may have an attribute `data_config`, as `ImageClassifier` has.
        root: The Vision Transformer in it.
        given: Entries that replace those of the model.
    """
    own = getattr(model, "data_config", None)
    found = own if isinstance(own, Mapping) else data_config_of(root)
    return {**(found or {}), **(given or {})}


def write_preprocessing(folder: Path, config: Mapping[str, Any], inputs: ImageInput) -> None:
    """Writes how images are prepared; entries that are not known are null, and a remark says so.

    Args:
        folder: The folder.
        config: See `data_config`.
        inputs: The images that the file takes; of it are `mean` and `std` where the file normalises.
    """
    known = {name: _plain(config.get(name)) for name in PREPROCESSING}
    inside = inputs.form == "uint8"
    if inside:
        known |= {"mean": _plain(inputs.mean), "std": _plain(inputs.std)}
    unknown = [name for name, value in known.items() if value is None and name != "crop_mode"]
    remark = f"The model does not say: {', '.join(unknown)}." if unknown else ""
    document = {
        **known,
        "layout": "NCHW",
        "dtype": inputs.form,
        "range": [0, 255] if inside else None,
        "normalised_inside": inside,  # scaled to [0, 1], mean subtracted, divided by std
        "remark": remark,
    }
    (folder / "preprocessing.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """The data config that `write_preprocessing` wrote; empty if size or normalisation of the images are unknown.

    Raises:
        FileFormatError: If the file cannot be read.
    """
    path = folder / "preprocessing.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = {name: document[name] for name in PREPROCESSING if document[name] is not None}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FileFormatError(f"Cannot read {path}: {error}") from error
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    return tuples if {"input_size", "mean", "std"} <= known.keys() else {}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
