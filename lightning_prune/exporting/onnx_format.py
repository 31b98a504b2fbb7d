"""The format ONNX, for ONNX Runtime and for converters of accelerators."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from lightning_prune.errors import ExportError
from lightning_prune.exporting.formats import BATCH, ExportFormat
from lightning_prune.exporting.precision import is_quantized
from lightning_prune.exporting.runtime_graph import RuntimeGraph, graph_in_onnxruntime
from lightning_prune.runtimes.calibration import calibration_batches
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_store import RunGraph


class OnnxFormat(ExportFormat):
    """ONNX; weights beyond 2 GiB, which a file of it cannot hold, are in a second file."""

    name = "onnx"
    runtime_name = "onnxruntime"
    files = ("model.onnx", "model.onnx.data")
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    precisions: ClassVar[Mapping[str, str]] = {
        "float32": "onnxruntime",
        "float16": "onnxruntime",
        "bfloat16": "onnxruntime",
        "int8": "onnxruntime:quantize=static",
        "int8-dynamic": "onnxruntime:quantize=dynamic",
    }

    def convert(self, graph: ExportedGraph, opset: int | None, dynamic: bool) -> Any:
        """See `ExportFormat.convert`."""
        from lightning_prune.runtimes.onnx_conversion import to_onnx

        model = to_onnx(graph, opset, BATCH if dynamic else None)
        if is_quantized(self.precision):
            from lightning_prune.runtimes.onnx_quantization import Quantization, quantized_onnx

            batches = calibration_batches(graph, self.runtime.name) if self._is_static else []
            how: Quantization = "static" if self._is_static else "dynamic"
            model = quantized_onnx(model, how, batches, self._onnxruntime.reduces_range)
        made = self.opset(model)
        if opset is not None and made != opset:
            raise ExportError(f"The graph cannot be converted to opset {opset}: its operators became those of {made}.")
        return model

    def write(self, converted: Any, folder: Path) -> None:
        """See `ExportFormat.write`."""
        from lightning_prune.runtimes.onnx_conversion import save_onnx

        save_onnx(converted, folder / self.files[0])

    def load(self, folder: Path, shape: tuple[int, ...]) -> RunGraph:
        """See `ExportFormat.load`."""
        with self._explaining():
            run: RunGraph = self._onnxruntime.load_file(folder / self.files[0], {BATCH: shape[0]}, self._is_static)
        return run

    def load_graph(self, graph: ExportedGraph) -> RunGraph:
        """See `ExportFormat.load_graph`."""
        with self._explaining():
            run: RunGraph = self._onnxruntime.load(graph)
        return run

    def in_runtime(self, folder: Path, shape: tuple[int, ...]) -> RuntimeGraph:
        """See `ExportFormat.in_runtime`."""
        graph = self._onnxruntime.optimized(folder / self.files[0], {BATCH: shape[0]}, self._is_static)
        return graph_in_onnxruntime(*graph)

    def operators(self, converted: Any) -> list[str]:
        """See `ExportFormat.operators`."""
        nodes = (*converted.graph.node, *(node for function in converted.functions for node in function.node))
        return [node.op_type for node in nodes]

    def input_name(self, converted: Any) -> str:
        """See `ExportFormat.input_name`."""
        return str(converted.graph.input[0].name)

    def opset(self, converted: Any) -> int | None:
        """See `ExportFormat.opset`; read from the model."""
        return next((each.version for each in converted.opset_import if each.domain in ("", "ai.onnx")), None)

    @property
    def _onnxruntime(self) -> Any:
        return self.runtime

    @property
    def _is_static(self) -> bool:
        """Whether ranges of activations are constants of the file."""
        return self.precision == "int8"

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """ONNX Runtime names the first operator that it does not have in bfloat16, and says nothing of the reason."""
        try:
            yield
        except ExportError as error:
            if self.precision != "bfloat16":
                raise
            raise ExportError(
                f"`precision` must be 'float32', 'float16' or 'int8' in {self.runtime.name!r}, which lacks operators "
                f"in bfloat16: {error}"
            ) from error
