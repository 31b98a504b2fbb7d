"""The format of AOTInductor: a library that was compiled for one kind of processor, as a `.pt2` package."""

from pathlib import Path
from typing import NamedTuple

from torch.export import ExportedProgram

from lightning_prune.exporting.formats import ExportFormat, program_operators
from lightning_prune.exporting.runtime_graph import RuntimeGraph, graph_in_aotinductor
from lightning_prune.runtimes.aotinductor_runtime import CompiledPackage, compile_package, load_package
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_store import RunGraph


class CompiledProgram(NamedTuple):
    """A graph, and what AOTInductor makes of it."""

    program: ExportedProgram
    package: CompiledPackage


class AOTInductorFormat(ExportFormat):
    """A `.pt2` package with a compiled library and its weights.

    PyTorch loads it without the classes of the model. It runs on processors like that of the machine that compiled it,
    with its number of threads.
    """

    name = "aotinductor"
    runtime_name = "aotinductor"
    files = ("model.pt2",)
    packages = ("torch",)
    precisions = dict.fromkeys(("float32", "float16", "bfloat16"), "aotinductor")
    _package: CompiledPackage | None = None

    def convert(self, graph: ExportedGraph, opset: int | None, dynamic: bool) -> CompiledProgram:
        """See `ExportFormat.convert`. Takes from half a minute to minutes, as a warning says before."""
        self._package = compile_package(graph)
        return CompiledProgram(graph.program, self._package)

    def write(self, converted: CompiledProgram, folder: Path) -> None:
        """See `ExportFormat.write`."""
        (folder / self.files[0]).write_bytes(converted.package.content)

    def load(self, folder: Path, shape: tuple[int, ...]) -> RunGraph:
        """See `ExportFormat.load`."""
        return load_package(folder / self.files[0])

    def load_graph(self, graph: ExportedGraph) -> RunGraph:
        """See `ExportFormat.load_graph`."""
        assert isinstance(self.runtime, ConvertedRuntime)  # by its name
        return self.runtime.load(graph)

    def in_runtime(self, folder: Path, shape: tuple[int, ...]) -> RuntimeGraph | None:
        """See `ExportFormat.in_runtime`. A package does not say what it was made of: of what `convert` made last."""
        return None if self._package is None else graph_in_aotinductor(self._package.compiled, self._package.others)

    def operators(self, converted: CompiledProgram) -> list[str]:
        """See `ExportFormat.operators`: those of the graph that was compiled, which fuses most of them."""
        return program_operators(converted.program)

    def input_name(self, converted: CompiledProgram) -> str:
        """See `ExportFormat.input_name`."""
        return str(converted.program.graph_signature.user_inputs[0])
