"""OpenVINO: a model is exported, converted and compiled for one of its devices."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from lightning_prune._utils.validation import check, check_bool, check_choice, check_int
from lightning_prune.errors import ExportError, FileWriteError, RuntimeUnavailableError
from lightning_prune.runtimes.calibration import calibration_batches
from lightning_prune.runtimes.converted import LOW_PRECISION_TOLERANCE, ConvertedRuntime, not_float32
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_sessions import openvino_settings
from lightning_prune.runtimes.graph_store import RunGraph
from lightning_prune.runtimes.onnx_conversion import to_onnx
from lightning_prune.runtimes.weight_range import reduces_range

Precision = Literal["f32", "f16", "bf16", "default"]
"""What OpenVINO computes in; its own default differs by device, and is often less than float32."""


class OpenVINO(ConvertedRuntime):
    """OpenVINO, with static shapes and one stream.

    Args:
        device: Such as `CPU`, `GPU` or `NPU`.
        precision: What it computes in. `"default"` leaves that to OpenVINO, which takes bfloat16 on processors that
            have it; `context` says what it takes here.
        threads: Threads on a CPU; as many as PyTorch has now if None.
        quantize: `"int8"` computes products in 8 bits, in ranges that NNCF finds on images (see
            `lightning_prune.runtimes.calibration`); the rest in `precision`. None: all of it in `precision`.
        reduce_range: As of `OnnxRuntime`.

    Raises:
        ArgumentError: If there is no such device (lists those that are), or another argument is out of range.
        RuntimeUnavailableError: If NNCF is needed and not installed; names the extra that installs it.

    Example:
        >>> from lightning_prune.runtimes import parse_runtime
        >>> parse_runtime("openvino"), parse_runtime("openvino:precision=bf16,threads=1")
        (OpenVINO('openvino'), OpenVINO('openvino:precision=bf16,threads=1'))
    """

    weight_dtypes = (torch.float32, torch.float16)

    def __init__(
        self,
        device: str = "CPU",
        precision: Precision = "f32",
        threads: int | None = None,
        quantize: Literal["int8"] | None = None,
        reduce_range: bool | None = None,
    ) -> None:
        check_choice("precision", precision, get_args(Precision))
        known = _core().available_devices
        check("device", device, f"one of {', '.join(known)}", device in known)
        if threads is not None:
            check_int("threads", threads, 1)
        if quantize is not None:
            check_choice("quantize", quantize, ("int8",))
            _nncf_version()
        if reduce_range is not None:
            check_bool("reduce_range", reduce_range)
        self.device, self.precision, self.threads, self.quantize = device, precision, threads, quantize
        self.reduce_range = reduce_range
        if quantize is not None:
            self.tolerance = None
        elif precision != "f32" or device != "CPU":
            self.tolerance = LOW_PRECISION_TOLERANCE
        settings = {"device": (device, "CPU"), "precision": (precision, "f32"), "threads": (threads, None)}
        self.name = self._spec("openvino", **settings, quantize=(quantize, None), reduce_range=(reduce_range, None))

    def context(self) -> dict[str, Any]:
        """See `Runtime.context`. The precision is read back from what OpenVINO made of the settings."""
        bits = ", weights in 7 bits" if self.reduces_range else ""
        return {
            "runtime": self.name,
            "openvino": ov.get_version(),
            "torch": str(torch.__version__),  # its exporter makes the graph
            "provider": self.device,
            "threads": self._threads(),
            "runtime_precision": _precision_of(self.device, tuple(self._settings().items())),
            **({} if self.quantize is None else {"quantization": f"nncf {_nncf_version()}, {self.quantize}{bits}"}),
        }

    def quantized(self) -> "OpenVINO":
        """See `Runtime.quantized`."""
        return OpenVINO(self.device, self.precision, self.threads, "int8", self.reduce_range)

    @property
    def unquantized(self) -> "OpenVINO":
        """See `Runtime.unquantized`."""
        return OpenVINO(self.device, self.precision, self.threads, reduce_range=self.reduce_range)

    @property
    def reduces_range(self) -> bool:
        """Whether weights in 8 bits take half of their range."""
        return reduces_range(self.reduce_range, self.device == "CPU")

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """See `Runtime.unsupported_reason`."""
        reason = super().unsupported_reason(model)
        return not_float32(model) if reason is None and self.quantize is not None else reason

    def load(self, graph: ExportedGraph) -> RunGraph:
        """See `ConvertedRuntime.load`."""
        return _bound(self._compiled(self._model(graph)))

    def load_counts(self, graph: ExportedGraph) -> Callable[[int], RunGraph]:
        """See `ConvertedRuntime.load_counts`."""
        model = self._model(graph)

        def load(count: int) -> RunGraph:
            static = model.clone()
            images, _ = graph.inputs
            ports = static.inputs
            static.reshape({ports[0]: ov.PartialShape(list(images.shape)), ports[1]: ov.PartialShape([count])})
            return _bound(self._compiled(static))

        return load

    def save(self, graph: ExportedGraph, folder: Path, name: str, counts: bool = False) -> list[str]:
        """See `ConvertedRuntime.save`; the weights as they are, in a file next to the graph."""
        path = folder / f"{name}.xml"
        try:
            ov.save_model(self._model(graph), path, compress_to_fp16=False)
        except RuntimeError as error:  # also of the operating system, as text
            raise FileWriteError(f"Cannot write {path}: {error}") from error
        return [path.name, path.with_suffix(".bin").name]

    def device_settings(self) -> dict[str, Any]:
        """See `ConvertedRuntime.device_settings`."""
        given = {"precision": self.precision, "quantize": self.quantize, "reduce_range": self.reduce_range}
        return {
            "package": "openvino",
            "provider": self.device,
            "threads": self.threads,
            "settings": {key: value for key, value in given.items() if value is not None},
        }

    def _model(self, graph: ExportedGraph) -> ov.Model:
        """The model that this runtime runs for a graph."""
        model = to_openvino(graph)
        if self.quantize is None:
            return model
        from lightning_prune.runtimes.openvino_quantization import quantized_openvino

        return quantized_openvino(model, calibration_batches(graph, self.name), self.reduces_range)

    def load_file(self, path: Path, shape: tuple[int, ...]) -> RunGraph:
        """Loads a model file with static shapes.

        Args:
            path: The file, with its weights where OpenVINO looks for them.
            shape: Of its input.

        Raises:
            ExportError: If OpenVINO does not accept the model.
        """
        return _bound(self._compiled(self._read(path, shape)))

    def _read(self, path: Path, shape: tuple[int, ...]) -> ov.Model:
        try:
            model = _core().read_model(path)
            model.reshape(list(shape))
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot read {path}: {error}") from error
        return model

    def executed(self, path: Path, shape: tuple[int, ...]) -> ov.Model:
        """The graph that is executed for a model file, with what OpenVINO notes of each operator.

        Args:
            path: As of `load_file`.
            shape: As of `load_file`.

        Raises:
            ExportError: As `load_file`.
        """
        return self._compiled(self._read(path, shape)).get_runtime_model()

    def _compiled(self, model: ov.Model) -> Any:
        try:
            return _core().compile_model(model, self.device, self._settings())
        except RuntimeError as error:
            raise ExportError(f"OpenVINO does not accept the model on {self.device}: {error}") from error

    def _settings(self) -> dict[str, Any]:
        return openvino_settings(self.device, self.precision, self._threads())

    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads


def to_openvino(graph: ExportedGraph) -> ov.Model:
    """The OpenVINO model of a graph, its weights as they are.

    The graph is read directly, which keeps attention one operator; by way of ONNX where an operator has no direct form.

    Raises:
        ExportError: If neither way leads there, or OpenVINO computes an operator wrongly; names the operator.
    """
    try:
        return ov.convert_model(graph.program)
    except Exception:  # its front end raises what it likes
        model = to_onnx(graph)
    _refuse_antialias(model)
    try:
        from io import BytesIO

        return ov.convert_model(BytesIO(model.SerializeToString()))
    except Exception as error:
        raise ExportError(f"The graph cannot be converted to OpenVINO: {error}") from error


def _refuse_antialias(model: Any) -> None:
    """Raises ExportError for an ONNX model that scales with antialias: OpenVINO (2026.4) leaves the filter out."""
    for node in model.graph.node:
        if node.op_type == "Resize" and any(each.name == "antialias" and each.i for each in node.attribute):
            raise ExportError(
                "OpenVINO computes Resize with antialias wrongly, by which this model scales its images. Scale them "
                "before the model, or take another runtime."
            )


def _bound(compiled: Any) -> RunGraph:
    """A function that runs a compiled model on the memory of torch tensors."""
    request = compiled.create_infer_request()
    names = range(len(compiled.inputs))
    outputs = compiled.outputs

    def run(*tensors: Tensor) -> list[Tensor]:
        held = [np.ascontiguousarray(tensor.cpu().numpy()) for tensor in tensors]
        shared = {name: ov.Tensor(array, shared_memory=True) for name, array in zip(names, held, strict=True)}
        results = request.infer(shared, share_outputs=False)
        return [torch.from_numpy(results[port]).to(tensors[0].device) for port in outputs]

    return run


def _nncf_version() -> str:
    try:
        import nncf
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"`quantize` needs a package that is not installed here: {error}. "
            "Install it: pip install 'lightning-prune[openvino]'."
        ) from error
    return str(nncf.__version__)


@cache
def _core() -> ov.Core:
    return ov.Core()


@cache
def _precision_of(device: str, settings: tuple[tuple[str, Any], ...]) -> str:
    """What a device computes in with these settings, read from a compiled model."""
    parameter = ov.opset13.parameter([1, 8], np.float32)
    model = ov.Model([ov.opset13.matmul(parameter, np.ones((8, 8), np.float32), False, False)], [parameter])
    compiled = _core().compile_model(model, device, dict(settings))
    return str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
