"""The base class of formats of exported models: how each is written and loaded, and which operators it has."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_prune import __version__
from lightning_prune._utils.validation import check, check_bool
from lightning_prune.errors import ArgumentError
from lightning_prune.exporting.precision import is_quantized
from lightning_prune.exporting.runtime_graph import RuntimeGraph
from lightning_prune.runtimes.base import Runtime
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_store import RunGraph
from lightning_prune.runtimes.registry import parse_runtime

BATCH = "batch"
"""Name of the dynamic dimension of a file that takes any number of images."""


class ExportFormat(ABC):
    """A file format of models, and the runtime that is measured with it.

    Args:
        runtime: Spec of the runtime, `runtime_name` with settings; that of the precision if None.
        precision: See `export`.
        reduce_range: See `export`; not with `runtime`, which says it.

    Raises:
        ArgumentError: If it is the spec of another runtime, or the format has no such precision.
        RuntimeUnavailableError: If the runtime is not installed; names the extra that installs it.

    Attributes:
        name: As it is given to `export`.
        runtime_name: Name of the runtime.
        files: Names of the files of a model. Some may be missing; the first is what is loaded.
        packages: Packages that take part in making them.
        precisions: Precision -> spec of the runtime that computes in it.
        runtime: The runtime.
        precision: The precision.
    """

    name: ClassVar[str]
    runtime_name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]
    precisions: ClassVar[Mapping[str, str]]

    def __init__(
        self, runtime: str | None = None, precision: str = "float32", reduce_range: bool | None = None
    ) -> None:
        if precision not in self.precisions:
            known = " or ".join(map(repr, self.precisions))
            raise ArgumentError(f"`precision` must be {known} with format={self.name!r}, got {precision!r}.")
        if reduce_range is not None:
            check_bool("reduce_range", reduce_range)
            check("reduce_range", reduce_range, f"left out with precision={precision!r}", is_quantized(precision))
        halved = "" if reduce_range is None else f",reduce_range={reduce_range}"
        self.runtime: Runtime = parse_runtime(f"{self.precisions[precision]}{halved}" if runtime is None else runtime)
        self.precision = precision
        if self.runtime.name.partition(":")[0] != self.runtime_name:
            raise ArgumentError(f"`runtime` must be {self.runtime_name!r} for a {self.name} file, got {runtime!r}.")

    def refuse(self, model: nn.Module) -> None:
        """Raises ArgumentError if the runtime cannot run a model."""
        reason = self.runtime.unsupported_reason(model)
        if reason is not None:
            raise ArgumentError(f"`model` must be one that {self.runtime_name} can run, got one that cannot: {reason}")

    @abstractmethod
    def convert(self, graph: ExportedGraph, opset: int | None, dynamic: bool) -> Any:
        """The model in this format, in memory.

        Args:
            graph: Of (B, C, H, W) images.
            opset: Version of ONNX's operators; only ONNX has one.
            dynamic: Whether B is dynamic.

        Raises:
            ExportError: If the graph cannot be converted; names the operator where that is known.
        """

    @abstractmethod
    def write(self, converted: Any, folder: Path) -> None:
        """Writes `files` of what `convert` returned.

        Raises:
            OSError: If they cannot be written.
        """

    @abstractmethod
    def load(self, folder: Path, shape: tuple[int, ...]) -> RunGraph:
        """Loads the files for (B, C, H, W) images of a shape.

        Raises:
            ExportError: If the runtime does not accept them.
        """

    @abstractmethod
    def load_graph(self, graph: ExportedGraph) -> RunGraph:
        """Loads a graph with static shapes without writing it, as the runtime does while it is measured."""

    def in_runtime(self, folder: Path, shape: tuple[int, ...]) -> RuntimeGraph | None:
        """What the runtime makes of the files for (B, C, H, W) images of a shape; None where it does not say."""
        return None

    @abstractmethod
    def operators(self, converted: Any) -> list[str]:
        """The name of each operator of what `convert` returned."""

    @abstractmethod
    def input_name(self, converted: Any) -> str:
        """Name of the input of what `convert` returned."""

    def opset(self, converted: Any) -> int | None:
        """Version of ONNX's operators of what `convert` returned; None for other formats."""
        return None

    def versions(self) -> dict[str, str]:
        """Package -> version, of this package and of `packages`."""
        return {"lightning_prune": __version__, **{name: version(name) for name in self.packages}}

    def count_operators(self, converted: Any) -> dict[str, int]:
        """Operator -> how often it is there, the most frequent first."""
        return dict(Counter(self.operators(converted)).most_common())


def program_operators(program: torch.export.ExportedProgram) -> list[str]:
    """The name of each operator of a graph of PyTorch."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
