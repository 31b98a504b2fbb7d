"""Models of Hugging Face transformers: by name or folder, their weights, and how their images are prepared."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError, WeightsError

Problems = list[tuple[str, list[str]]]  # kind of mismatch -> keys
_PREFIX = "hf:"
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # numbers of Pillow


def is_hugging_face(model: object) -> bool:
    """Whether it is a model of transformers, which need not be installed."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def is_hugging_face_name(name: str) -> bool:
    """Whether a model is named as `hf:NAME_OR_FOLDER`."""
    return name.startswith(_PREFIX)


def create_hugging_face(name: str, pretrained: bool, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """Makes the model that a folder or a name on Hugging Face's Hub holds, by the architecture in its configuration.

    Of a model of images and text, such as `CLIPModel`, it makes the vision tower.

    Args:
        name: `hf:` and a folder that `save_pretrained` wrote, or a name on the Hub, whose files may be downloaded.
        pretrained: Whether to load the weights.
        num_classes: Size of the head; if it differs from that of the weights, the head is initialised at random.
        kwargs: Further entries of the configuration.

    Returns:
        The model, in evaluation mode.

    Raises:
        ArgumentError: If transformers is not installed, or `num_classes` is given for a model without a head.
        WeightsError: If there is no such model, or weights are missing in its files.
    """
    source = str(Path(name.removeprefix(_PREFIX)).expanduser())
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(
            f"`model` must be a timm model where transformers is not installed, got {name!r}. To install it: "
            "pip install 'lightning-prune[huggingface]'."
        ) from error
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source, **kwargs)
        kind = _architecture(transformers, config)
        if num_classes is not None:
            if not kind.__name__.endswith(("ForImageClassification", "ForImageClassificationWithTeacher")):
                raise ArgumentError(
                    f"`num_classes` must be None for {kind.__name__}, which has no head, got {num_classes}."
                )
            config.num_labels = num_classes
        if not pretrained:
            model: nn.Module = kind(config).eval()
            return model
        with quiet_transformers():
            model, report = kind.from_pretrained(
                source,
                config=getattr(config, "vision_config", config) if kind.__name__.endswith("VisionModel") else config,
                ignore_mismatched_sizes=num_classes is not None,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise WeightsError(
            f"`model` must be hf: and a folder that `save_pretrained` wrote, or a name on Hugging Face's Hub, "
            f"got {name!r}: {_first_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing and kind.__name__.endswith("Model"):
        rank_zero_warn(f"{len(missing)} keys are not in {source} and have random values: {', '.join(missing[:3])}.")
    elif missing:
        raise WeightsError(
            f"`model` must name files with all keys of {kind.__name__}, got {name!r} with {len(missing)} missing: "
            f"{', '.join(missing[:3])}."
        )
    return model


def renamed(model: Any, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Problems]:
    """The state that `from_pretrained` makes of tensors, whose keys may be those of older versions of transformers.

    Args:
        model: A model of Hugging Face; it is not changed.
        found: The tensors by key.

    Returns:
        The state of the model, and the keys that keep it from being complete.
    """
    with quiet_transformers():
        loaded, report = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(found), output_loading_info=True, ignore_mismatched_sizes=True
        )
    reshaped = [f"{key} (model {tuple(ours)}, file {tuple(theirs)})" for key, theirs, ours in report["mismatched_keys"]]
    problems = [
        ("missing", sorted(report["missing_keys"])),
        ("unexpected", sorted(report["unexpected_keys"])),
        ("with another shape", sorted(reshaped)),
    ]
    return dict(loaded.state_dict()), problems


def image_config(model: Any) -> dict[str, Any]:
    """How images are prepared for a model of Hugging Face, in the form of timm's data config.

    Args:
        model: The model. The size of its images is that of its image processor, or else of its configuration.

    Returns:
        `input_size` (C, H, W), `interpolation`, `crop_pct` and `crop_mode`; also `mean` and `std` if there is an image
        processor among the files of the model.
    """
    config = getattr(model.config, "vision_config", model.config)
    size, channels = config.image_size, getattr(config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    found = _processor(model.config.name_or_path)
    if found is None:
        return {"input_size": (channels, height, width), "interpolation": "bicubic", "crop_pct": 1.0}
    resized, cropped = found.get("size") or {}, found.get("crop_size") or {}
    final = cropped if found.get("do_center_crop") and cropped.get("height") else resized
    height, width = final.get("height") or height, final.get("width") or width
    shortest = resized.get("shortest_edge") or resized.get("height") or height
    prepared = {
        "input_size": (channels, height, width),
        "interpolation": _INTERPOLATIONS.get(int(found.get("resample") or 2), "bilinear"),
        "crop_pct": height / shortest,
        "crop_mode": "center" if resized.get("shortest_edge") else "squash",
    }
    if not found.get("do_normalize", True):
        return {**prepared, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    return {**prepared, "mean": tuple(found["image_mean"]), "std": tuple(found["image_std"])}


@lru_cache
def _processor(source: str) -> dict[str, Any] | None:
    """The settings of the image processor among the files of a model; None if there is none."""
    from transformers import AutoImageProcessor

    try:
        with quiet_transformers():
            return dict(AutoImageProcessor.from_pretrained(source).to_dict()) if source else None
    except (OSError, ValueError, ImportError, KeyError):
        return None


def _architecture(transformers: Any, config: Any) -> Any:
    """The class of a model, by its configuration; the vision tower of a model of images and text."""
    name = next(iter(config.architectures or ()), "")
    if hasattr(config, "vision_config") and name.endswith("Model") and not name.endswith("VisionModel"):
        name = f"{name.removesuffix('Model')}VisionModel"
    return getattr(transformers, name, transformers.AutoModelForImageClassification)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without the progress bar and the table of keys of transformers; nothing if it is not imported."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
