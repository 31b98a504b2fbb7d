"""An image classifier as a LightningModule, with its data and its checkpoints.

Names are resolved on first use, because the package root imports `demo_models`, which must not import Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.classification.checkpoints import load_weights, read_weights
    from lightning_prune.classification.datamodules import DigitsData, ImageFolderData
    from lightning_prune.classification.dense_features import DenseFeatures
    from lightning_prune.classification.image_classifier import ImageClassifier
    from lightning_prune.classification.image_table import ImageTableData
    from lightning_prune.classification.zero_shot_classifier import ZeroShotClassifier
    from lightning_prune.classification.zero_shot_model import ZeroShotModel, zero_shot

_FILES = {
    "DenseFeatures": "dense_features",
    "DigitsData": "datamodules",
    "ImageClassifier": "image_classifier",
    "ImageFolderData": "datamodules",
    "ImageTableData": "image_table",
    "ZeroShotClassifier": "zero_shot_classifier",
    "ZeroShotModel": "zero_shot_model",
    "load_weights": "checkpoints",
    "read_weights": "checkpoints",
    "zero_shot": "zero_shot_model",
}

__all__ = [
    "DenseFeatures",
    "DigitsData",
    "ImageClassifier",
    "ImageFolderData",
    "ImageTableData",
    "ZeroShotClassifier",
    "ZeroShotModel",
    "load_weights",
    "read_weights",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
