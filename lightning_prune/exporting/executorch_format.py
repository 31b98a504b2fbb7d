"""The format of ExecuTorch: a program for devices without PyTorch (`.pte`)."""

from collections import Counter
from pathlib import Path
from typing import Any

from lightning_prune.errors import ArgumentError
from lightning_prune.exporting.formats import ExportFormat
from lightning_prune.exporting.runtime_graph import RuntimeGraph, graph_in_executorch
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_store import RunGraph


class ExecuTorchFormat(ExportFormat):
    """A `.pte` file, for batches of one size."""

    name = "executorch"
    runtime_name = "executorch"
    files = ("model.pte",)
    packages = ("torch", "executorch")
    precisions = dict.fromkeys(("float32", "float16"), "executorch")
    _made: Any = None

    def convert(self, graph: ExportedGraph, opset: int | None, dynamic: bool) -> Any:
        """See `ExportFormat.convert`.

        Raises:
            ArgumentError: If the graph is for any number of images: memory is planned ahead.
        """
        from lightning_prune.runtimes.executorch_runtime import to_edge_program

        if dynamic:
            raise ArgumentError("`batch` must be 'static' with format='executorch', got 'dynamic'.")
        self._made = to_edge_program(graph)
        return self._made

    def write(self, converted: Any, folder: Path) -> None:
        """See `ExportFormat.write`."""
        (folder / self.files[0]).write_bytes(converted.content)

    def load(self, folder: Path, shape: tuple[int, ...]) -> RunGraph:
        """See `ExportFormat.load`."""
        from lightning_prune.runtimes.executorch_runtime import load_program

        return load_program(folder / self.files[0])

    def load_graph(self, graph: ExportedGraph) -> RunGraph:
        """See `ExportFormat.load_graph`."""
        assert isinstance(self.runtime, ConvertedRuntime)  # by its name
        return self.runtime.load(graph)

    def operators(self, converted: Any) -> list[str]:
        """See `ExportFormat.operators`: those that XNNPACK runs, and the others."""
        return list((Counter(converted.delegated) + Counter(converted.others)).elements())

    def in_runtime(self, folder: Path, shape: tuple[int, ...]) -> RuntimeGraph | None:
        """See `ExportFormat.in_runtime`. A program does not say what it was made of: of what `convert` made last."""
        return None if self._made is None else graph_in_executorch(self._made.delegated, self._made.others)

    def input_name(self, converted: Any) -> str:
        """See `ExportFormat.input_name`; inputs of a program have numbers."""
        return "0"
