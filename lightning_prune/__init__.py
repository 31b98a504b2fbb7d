"""Makes Vision Transformers faster on the device at hand, without training.

Names are resolved on first use, so `import lightning_prune` costs neither torch nor lightning: the command line
answers `--help` at once, and a deployment that only patches a model never imports lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AccuracyBudget": "planning.objective",
    "ArgumentError": "errors",
    "DataError": "errors",
    "DigitsData": "data",
    "FileFormatError": "errors",
    "ImageClassifier": "classifier",
    "ImageFolderData": "data",
    "LatencyProfile": "profiling.latency",
    "PatchHandle": "patching",
    "Plan": "planning.planner",
    "PruneError": "errors",
    "Schedule": "schedule",
    "ScheduleError": "errors",
    "TokenPruning": "callbacks",
    "UnsupportedModelError": "errors",
    "Utility": "planning.objective",
    "WeightsError": "errors",
    "compare_latency": "profiling.latency",
    "patch": "patching",
    "plan": "planning.planner",
    "profile_latency": "profiling.latency",
}
_ROOMS = ("callbacks", "metrics", "patching", "planning", "profiling", "reduction", "report")

__all__ = ["__version__", *sorted(_HOME), *_ROOMS]


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
