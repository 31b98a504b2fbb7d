"""The format of OpenVINO."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lightning_prune.errors import ArgumentError, ExportError, FileWriteError
from lightning_prune.exporting.formats import ExportFormat
from lightning_prune.exporting.precision import is_quantized
from lightning_prune.exporting.runtime_graph import RuntimeGraph, graph_in_openvino
from lightning_prune.runtimes.calibration import calibration_batches
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_store import RunGraph


class OpenVINOFormat(ExportFormat):
    """OpenVINO's own format: the graph, and its weights as they are."""

    name = "openvino"
    runtime_name = "openvino"
    files = ("model.xml", "model.bin")
    packages = ("torch", "openvino")
    precisions: ClassVar[Mapping[str, str]] = {
        "float32": "openvino",
        "float16": "openvino",
        "bfloat16": "openvino:precision=bf16",
        "int8": "openvino:quantize=int8",
    }

    def refuse(self, model: nn.Module) -> None:
        """See `ExportFormat.refuse`. The precision is read back: a device may compute in another."""
        super().refuse(model)
        computes = self.runtime.context()["runtime_precision"]
        if self.precision == "bfloat16" and computes != "bf16":
            raise ArgumentError(
                f"`precision` must be one that {self.runtime.name!r} computes in here, got 'bfloat16': it takes "
                f"{computes}."
            )

    def convert(self, graph: ExportedGraph, opset: int | None, dynamic: bool) -> Any:
        """See `ExportFormat.convert`."""
        from lightning_prune.runtimes.openvino_runtime import to_openvino

        model = to_openvino(graph)
        if is_quantized(self.precision):
            from lightning_prune.runtimes.openvino_quantization import quantized_openvino

            batches = calibration_batches(graph, self.runtime.name)
            model = quantized_openvino(model, batches, self._openvino.reduces_range)
        batch, *sizes = graph.inputs[0].shape
        try:
            model.reshape([-1 if dynamic else batch, *sizes])
        except RuntimeError as error:
            raise ExportError(f"The graph cannot be converted to OpenVINO: {error}") from error
        return model

    def write(self, converted: Any, folder: Path) -> None:
        """See `ExportFormat.write`."""
        import openvino

        path = folder / self.files[0]
        try:
            openvino.save_model(converted, path, compress_to_fp16=False)
        except RuntimeError as error:  # also of the operating system, as text
            raise FileWriteError(f"Cannot write {path}: {error}") from error

    def load(self, folder: Path, shape: tuple[int, ...]) -> RunGraph:
        """See `ExportFormat.load`."""
        run: RunGraph = self._openvino.load_file(folder / self.files[0], shape)
        return run

    def load_graph(self, graph: ExportedGraph) -> RunGraph:
        """See `ExportFormat.load_graph`."""
        run: RunGraph = self._openvino.load(graph)
        return run

    def in_runtime(self, folder: Path, shape: tuple[int, ...]) -> RuntimeGraph:
        """See `ExportFormat.in_runtime`."""
        return graph_in_openvino(self._openvino.executed(folder / self.files[0], shape))

    def operators(self, converted: Any) -> list[str]:
        """See `ExportFormat.operators`. Constants, inputs and outputs are no operators."""
        names = [each.get_type_name() for each in converted.get_ordered_ops()]
        return [name for name in names if name not in ("Constant", "Parameter", "Result")]

    def input_name(self, converted: Any) -> str:
        """See `ExportFormat.input_name`."""
        return str(converted.inputs[0].any_name)

    @property
    def _openvino(self) -> Any:
        return self.runtime
