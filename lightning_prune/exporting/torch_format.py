"""The format of `torch.export`, for PyTorch."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_prune.exporting.formats import ExportFormat, program_operators
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_store import RunGraph


class TorchExportFormat(ExportFormat):
    """A `.pt2` file of `torch.export`, which PyTorch loads without the classes of the model."""

    name = "torch-export"
    runtime_name = "torch"
    files = ("model.pt2",)
    packages = ("torch",)
    precisions = dict.fromkeys(("float32", "float16", "bfloat16"), "torch")

    def convert(self, graph: ExportedGraph, opset: int | None, dynamic: bool) -> Any:
        """See `ExportFormat.convert`."""
        for module in graph.program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # it names files of this machine
        return graph.program

    def write(self, converted: Any, folder: Path) -> None:
        """See `ExportFormat.write`."""
        content = io.BytesIO()  # written to a file, errors of the operating system would be private ones of torch
        torch.export.save(converted, content)
        (folder / self.files[0]).write_bytes(content.getvalue())

    def load(self, folder: Path, shape: tuple[int, ...]) -> RunGraph:
        """See `ExportFormat.load`."""
        return _run_program(torch.export.load(folder / self.files[0]))

    def load_graph(self, graph: ExportedGraph) -> RunGraph:
        """See `ExportFormat.load_graph`."""
        return _run_program(graph.program)

    def operators(self, converted: Any) -> list[str]:
        """See `ExportFormat.operators`."""
        return program_operators(converted)

    def input_name(self, converted: Any) -> str:
        """See `ExportFormat.input_name`."""
        return str(converted.graph_signature.user_inputs[0])


def _run_program(program: torch.export.ExportedProgram) -> RunGraph:
    module = program.module()

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            outputs = module(*tensors)
        return list(outputs) if isinstance(outputs, Sequence) else [outputs]

    return run
