"""How images are prepared for a model: size, crop, interpolation and normalisation, as timm's data config has them."""

from collections.abc import Mapping
from typing import Any

from timm.data.config import resolve_model_data_config
from torch import nn

from lightning_prune.classification.hugging_face import image_config, is_hugging_face
from lightning_prune.errors import DataError

_PLAIN = 0.5  # mean and std if they are not known


def data_config_of(model: nn.Module) -> dict[str, Any] | None:
    """The data config of a model as it is.

    The config that belongs to a name of timm is for the size and channels of the published weights. A model that was
    made for others (`img_size`, `in_chans`) gets images of its own size.

    Args:
        model: Of timm or Hugging Face.

    Returns:
        `input_size` (C, H, W), `interpolation`, `crop_pct`, and `mean` and `std` if they are known. None if the model
        is of another kind: its images are unknown.

    Example:
        >>> import timm
        >>> from lightning_prune.classification.preprocessing import data_config_of
        >>> data_config_of(timm.create_model("vit_tiny_patch16_224", img_size=96))["input_size"]
        (3, 96, 96)
    """
    if is_hugging_face(model) and hasattr(getattr(model, "config", None), "image_size"):
        return image_config(model)
    own: Any = getattr(model, "pretrained_cfg", None)
    if not own:
        return None
    if getattr(type(model), "classifies_by_tower", False):
        return dict(own)  # timm would complete what is not known by the mean of ImageNet
    config: dict[str, Any] = resolve_model_data_config(model)
    embed: Any = getattr(getattr(model, "backbone", model), "patch_embed", None)
    channels, height, width = config["input_size"]
    size = getattr(embed, "img_size", None)
    height, width = size if isinstance(size, tuple) and len(size) == 2 else (height, width)
    taken = getattr(getattr(embed, "proj", None), "in_channels", channels)
    if taken == 1 != channels:  # timm adds up the weights of the channels
        channels = 1
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    return {**config, "input_size": (channels, height, width)}


def complete_config(found: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> tuple[dict[str, Any], bool]:
    """The data config to use: that of the model, with the entries that the user gives.

    Args:
        found: Of the model; None if it is unknown.
        given: Of the user, complete or in part.

    Returns:
        The config, and whether mean and std are unknown; then they are 0.5.

    Raises:
        DataError: If the size of the images is unknown.
    """
    config = {**(found or {}), **(given or {})}
    if "input_size" not in config:
        raise DataError(
            "`data_config` must be given with `input_size` (C, H, W), `mean` and `std`, or be an attribute of the "
            f"LightningModule (ImageClassifier has it for models of timm and Hugging Face), got {config or None}: size "
            "and normalisation of the images are unknown."
        )
    unknown = not {"mean", "std"} <= config.keys()
    if unknown:
        channels = config["input_size"][0]
        config |= {"mean": (_PLAIN,) * channels, "std": (_PLAIN,) * channels}
    return config, unknown


def describe_config(config: Mapping[str, Any]) -> str:
    """A data config on one line.

    Example:
        >>> from lightning_prune.classification.preprocessing import describe_config
        >>> describe_config({"input_size": (1, 56, 56), "mean": (0.25,), "std": (0.5,), "crop_pct": 0.9})
        '1 x 56 x 56, crop 0.9, mean 0.25, std 0.5'
    """
    parts = [" x ".join(map(str, config["input_size"]))]
    parts += [str(config["interpolation"])] if "interpolation" in config else []
    parts += [f"crop {config['crop_pct']:.3g}"] if config.get("crop_pct") else []
    parts += [f"{name} {' '.join(f'{value:.4g}' for value in config[name])}" for name in ("mean", "std")]
    return ", ".join(parts)
