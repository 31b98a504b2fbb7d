"""The formats of exported models: how each is written and loaded, and which operators it has."""

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_prune import __version__
from lightning_prune.errors import ArgumentError, ExportError, FileWriteError
from lightning_prune.exporting.precision import is_quantized
from lightning_prune.exporting.runtime_graph import RuntimeGraph, graph_in_onnxruntime, graph_in_openvino
from lightning_prune.runtimes.base import Runtime
from lightning_prune.runtimes.calibration import calibration_batches
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

    Raises:
        ArgumentError: If it is the spec of another runtime, or the format has no such precision.
        RuntimeUnavailableError: If the runtime is not installed; names the extra that installs it.

    Attributes:
        name: As it is given to `export`.
        runtime_name: Name of the runtime.
        files: Names of the files of a model, some of which may be missing; the first is what is loaded.
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

    def __init__(self, runtime: str | None = None, precision: str = "float32") -> None:
        if precision not in self.precisions:
            known = " or ".join(map(repr, self.precisions))
            raise ArgumentError(f"`precision` must be {known} with format={self.name!r}, got {precision!r}.")
        self.runtime: Runtime = parse_runtime(self.precisions[precision] if runtime is None else runtime)
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
            from lightning_prune.runtimes.onnx_quantization import quantized_onnx

            batches = calibration_batches(graph, self.runtime.name) if self._is_static else []
            model = quantized_onnx(model, "static" if self._is_static else "dynamic", batches)
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

            model = quantized_openvino(model, calibration_batches(graph, self.runtime.name))
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


def program_operators(program: torch.export.ExportedProgram) -> list[str]:
    """The name of each operator of a graph of PyTorch."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def _run_program(program: torch.export.ExportedProgram) -> RunGraph:
    module = program.module()

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            outputs = module(*tensors)
        return list(outputs) if isinstance(outputs, Sequence) else [outputs]

    return run
