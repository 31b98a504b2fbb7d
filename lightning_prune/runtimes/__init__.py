"""What runs a model: PyTorch, eagerly or compiled. A runtime is named by one spec, `name[:key=value,...]`."""

from lightning_prune.runtimes.base import Runtime, applied_runtime
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.in_place import is_compiled
from lightning_prune.runtimes.registry import RUNTIMES, parse_runtime
from lightning_prune.runtimes.torch_runtime import TorchCompile, TorchEager

__all__ = [
    "RUNTIMES",
    "ConvertedRuntime",
    "Runtime",
    "TorchCompile",
    "TorchEager",
    "applied_runtime",
    "is_compiled",
    "parse_runtime",
]
