"""Makes Vision Transformers faster on the device at hand, without training.

Names are resolved on first use, so a deployment that only patches a model never imports Lightning.

Importing the package registers its two small models with timm (`vit_digits_patch4_56`, `vit_cifar_patch4_56`), and so
imports torch and timm. Only the command `lightning-prune` postpones that until a command runs, so that it answers
`--help` at once.
"""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AccuracyBudget": "planning.objectives",
    "ArgumentError": "errors",
    "DataError": "errors",
    "DigitsData": "classification.datamodules",
    "ExportError": "errors",
    "FileFormatError": "errors",
    "FileWriteError": "errors",
    "ImageClassifier": "classification.image_classifier",
    "ImageFolderData": "classification.datamodules",
    "ImageTableData": "classification.image_table",
    "KeepRates": "schedule",
    "LatencyBudget": "planning.objectives",
    "LatencyProfile": "profiling.latency_profile",
    "PatchHandle": "patching",
    "Plan": "planning.results",
    "PruneError": "errors",
    "RuntimeUnavailableError": "errors",
    "Schedule": "schedule",
    "ScheduleError": "errors",
    "TokenPruning": "callbacks",
    "UnsupportedModelError": "errors",
    "Utility": "planning.objectives",
    "Vocabulary": "reduction.vocabulary",
    "WeightsError": "errors",
    "ZeroShotClassifier": "classification.zero_shot_classifier",
    "bundle": "exporting",
    "compare": "comparison",
    "compare_latency": "profiling.measurement",
    "export": "exporting",
    "learn_vocabulary": "reduction.word_learning",
    "load_exported": "exporting",
    "patch": "patching",
    "plan": "planning.api",
    "profile_latency": "profiling.measurement",
    "trace_tokens": "patching",
}
_ROOMS = (
    "callbacks",
    "classification",
    "comparison",
    "exporting",
    "metrics",
    "patching",
    "planning",
    "profiling",
    "quantization",
    "reduction",
    "report",
    "runtimes",
)

__all__ = ["__version__", *sorted(_HOME), *_ROOMS]

if TYPE_CHECKING:  # the same names for type checkers and editors, which cannot follow __getattr__
    from lightning_prune import callbacks as callbacks
    from lightning_prune import classification as classification
    from lightning_prune import comparison as comparison
    from lightning_prune import exporting as exporting
    from lightning_prune import metrics as metrics
    from lightning_prune import patching as patching
    from lightning_prune import planning as planning
    from lightning_prune import profiling as profiling
    from lightning_prune import quantization as quantization
    from lightning_prune import reduction as reduction
    from lightning_prune import report as report
    from lightning_prune import runtimes as runtimes
    from lightning_prune.callbacks import TokenPruning as TokenPruning
    from lightning_prune.classification.datamodules import DigitsData as DigitsData
    from lightning_prune.classification.datamodules import ImageFolderData as ImageFolderData
    from lightning_prune.classification.image_classifier import ImageClassifier as ImageClassifier
    from lightning_prune.classification.image_table import ImageTableData as ImageTableData
    from lightning_prune.classification.zero_shot_classifier import ZeroShotClassifier as ZeroShotClassifier
    from lightning_prune.comparison import compare as compare
    from lightning_prune.errors import ArgumentError as ArgumentError
    from lightning_prune.errors import DataError as DataError
    from lightning_prune.errors import ExportError as ExportError
    from lightning_prune.errors import FileFormatError as FileFormatError
    from lightning_prune.errors import FileWriteError as FileWriteError
    from lightning_prune.errors import PruneError as PruneError
    from lightning_prune.errors import RuntimeUnavailableError as RuntimeUnavailableError
    from lightning_prune.errors import ScheduleError as ScheduleError
    from lightning_prune.errors import UnsupportedModelError as UnsupportedModelError
    from lightning_prune.errors import WeightsError as WeightsError
    from lightning_prune.exporting import bundle as bundle
    from lightning_prune.exporting import export as export
    from lightning_prune.exporting import load_exported as load_exported
    from lightning_prune.patching import PatchHandle as PatchHandle
    from lightning_prune.patching import patch as patch
    from lightning_prune.patching import trace_tokens as trace_tokens
    from lightning_prune.planning.api import plan as plan
    from lightning_prune.planning.objectives import AccuracyBudget as AccuracyBudget
    from lightning_prune.planning.objectives import LatencyBudget as LatencyBudget
    from lightning_prune.planning.objectives import Utility as Utility
    from lightning_prune.planning.results import Plan as Plan
    from lightning_prune.profiling.latency_profile import LatencyProfile as LatencyProfile
    from lightning_prune.profiling.measurement import compare_latency as compare_latency
    from lightning_prune.profiling.measurement import profile_latency as profile_latency
    from lightning_prune.reduction.vocabulary import Vocabulary as Vocabulary
    from lightning_prune.reduction.word_learning import learn_vocabulary as learn_vocabulary
    from lightning_prune.schedule import KeepRates as KeepRates
    from lightning_prune.schedule import Schedule as Schedule


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _is_command() -> bool:
    """Whether this process runs `lightning-prune` or `python -m lightning_prune`."""
    script = (getattr(sys, "argv", None) or [""])[0]
    if script == "-m":  # as long as `python -m` looks for the module that it runs
        return "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1] == __name__
    return PurePath(script).stem == "lightning-prune"


if not _is_command():
    import_module(f"{__name__}.classification.demo_models")
