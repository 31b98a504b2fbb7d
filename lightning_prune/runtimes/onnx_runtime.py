"""ONNX Runtime: a model is exported to ONNX and run by an inference session."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import onnxruntime as ort
import torch
from torch import Tensor, nn

from lightning_prune._utils.validation import check, check_bool, check_choice, check_int
from lightning_prune.errors import ArgumentError, ExportError
from lightning_prune.runtimes.calibration import calibration_batches
from lightning_prune.runtimes.converted import LOW_PRECISION_TOLERANCE, ConvertedRuntime, not_float32
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_sessions import CPU_PROVIDER, TOKENS, onnx_session
from lightning_prune.runtimes.graph_store import RunGraph
from lightning_prune.runtimes.onnx_conversion import NUMPY_DTYPES, is_large, save_onnx, to_onnx
from lightning_prune.runtimes.onnx_quantization import UNFUSED, Quantization, quantized_onnx
from lightning_prune.runtimes.weight_range import reduces_range


class OnnxRuntime(ConvertedRuntime):
    """ONNX Runtime, with static shapes; inputs and outputs stay in the memory of PyTorch's tensors.

    Args:
        provider: The execution provider; operators that it does not have run by the CPU provider.
        threads: Threads of one operator on a CPU; as many as PyTorch has now if None.
        quantize: How products with weights are computed in 8 bits. `"static"`: in ranges that are found on images (see
            `lightning_prune.runtimes.calibration`). `"dynamic"`: in the range of each batch as it comes, so that
            beyond batch size 1 the output of an image depends on the others in its batch. None: in floating point.
        reduce_range: Whether weights in 8 bits take half of their range, as processors need that add products in 16
            bits (see `lightning_prune.runtimes.weight_range`). None: where this machine needs it. For a file that runs
            on another machine, say what that one needs.

    Raises:
        ArgumentError: If the provider is not installed here (lists those that are), or another argument is out of
            range.

    Example:
        >>> from lightning_prune.runtimes import parse_runtime
        >>> parse_runtime("onnxruntime"), parse_runtime("onnxruntime:threads=1").threads
        (OnnxRuntime('onnxruntime'), 1)
    """

    weight_dtypes = (torch.float32, torch.float16)

    def __init__(
        self,
        provider: str = CPU_PROVIDER,
        threads: int | None = None,
        quantize: Quantization | None = None,
        reduce_range: bool | None = None,
    ) -> None:
        known = ort.get_available_providers()
        check("provider", provider, f"one of {', '.join(known)}", provider in known)
        if threads is not None:
            check_int("threads", threads, 1)
        if quantize is not None:
            check_choice("quantize", quantize, get_args(Quantization))
        if reduce_range is not None:
            check_bool("reduce_range", reduce_range)
        self.provider, self.threads, self.quantize, self.reduce_range = provider, threads, quantize, reduce_range
        if quantize is not None:
            self.tolerance = None
        elif provider != CPU_PROVIDER:  # it may compute in fewer bits
            self.tolerance = LOW_PRECISION_TOLERANCE
        settings = {"provider": (provider, CPU_PROVIDER), "threads": (threads, None), "quantize": (quantize, None)}
        self.name = self._spec("onnxruntime", **settings, reduce_range=(reduce_range, None))

    def context(self) -> dict[str, Any]:
        """See `Runtime.context`."""
        bits = ", weights in 7 bits" if self.reduces_range else ""
        return {
            "runtime": self.name,
            "onnxruntime": ort.__version__,
            "torch": str(torch.__version__),  # its exporter makes the graph
            "provider": self.provider,
            "threads": self._threads(),
            **({} if self.quantize is None else {"quantization": f"onnxruntime.quantization, {self.quantize}{bits}"}),
        }

    def quantized(self) -> "OnnxRuntime":
        """See `Runtime.quantized`: static, as an image then does not depend on the others in its batch."""
        return (
            self if self.quantize is not None else OnnxRuntime(self.provider, self.threads, "static", self.reduce_range)
        )

    @property
    def unquantized(self) -> "OnnxRuntime":
        """See `Runtime.unquantized`."""
        return OnnxRuntime(self.provider, self.threads, reduce_range=self.reduce_range)

    @property
    def reduces_range(self) -> bool:
        """Whether weights in 8 bits take half of their range."""
        return reduces_range(self.reduce_range, self.provider == CPU_PROVIDER)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """See `Runtime.unsupported_reason`."""
        reason = super().unsupported_reason(model)
        return not_float32(model) if reason is None and self.quantize is not None else reason

    def load(self, graph: ExportedGraph) -> RunGraph:
        """See `ConvertedRuntime.load`."""
        with _stored(self._onnx(graph)) as model:
            return self._session(model)

    def load_counts(self, graph: ExportedGraph) -> Callable[[int], RunGraph]:
        """See `ConvertedRuntime.load_counts`."""
        # The folder of a model that is too large to be kept in memory is deleted with the function that is returned.
        stored = ExitStack()
        model = stored.enter_context(_stored(self._onnx(graph, TOKENS)))

        def load(count: int, _kept: ExitStack = stored) -> RunGraph:
            return self._session(model, {TOKENS: count})

        return load

    def save(self, graph: ExportedGraph, folder: Path, name: str, counts: bool = False) -> list[str]:
        """See `ConvertedRuntime.save`."""
        return save_onnx(self._onnx(graph, TOKENS if counts else None), folder / f"{name}.onnx")

    def device_settings(self) -> dict[str, Any]:
        """See `ConvertedRuntime.device_settings`."""
        given = {"quantize": self.quantize, "reduce_range": self.reduce_range}
        return {
            "package": "onnxruntime",
            "provider": self.provider,
            "threads": self.threads,
            "settings": {key: value for key, value in given.items() if value is not None},
            "disabled_optimizers": list(UNFUSED) if self.quantize == "static" else None,
        }

    def _onnx(self, graph: ExportedGraph, dimension: str | None = None) -> Any:
        """The ONNX model that this runtime runs for a graph."""
        model = to_onnx(graph, dimension=dimension)
        if self.quantize is not None:
            batches = calibration_batches(graph, self.name) if self.quantize == "static" else []
            model = quantized_onnx(model, self.quantize, batches, self.reduces_range)
        return model

    def load_file(self, path: Path, dimensions: Mapping[str, int], quantized: bool = False) -> RunGraph:
        """Loads an ONNX file with static shapes.

        Args:
            path: The file; weights that are not in it are next to it.
            dimensions: Name -> size of its symbolic dimensions.
            quantized: Whether its products are quantized in constant ranges.

        Raises:
            ExportError: If ONNX Runtime does not accept the model.
        """
        return _bound(self._start(_content(path), dimensions, quantized))

    def optimized(
        self, path: Path, dimensions: Mapping[str, int], quantized: bool = False
    ) -> tuple[Any, dict[str, int] | None]:
        """What ONNX Runtime makes of a file before it runs it.

        Args:
            path: As of `load_file`.
            dimensions: As of `load_file`.
            quantized: As of `load_file`.

        Returns:
            The optimised model, as an `onnx.ModelProto` without its large weights; and operator -> how often it is not
            run by the provider, None where this version of ONNX Runtime does not say.
        """
        import onnx

        with TemporaryDirectory(prefix="lightning-prune-") as folder:
            written = Path(folder) / "optimized.onnx"
            session = self._start(_content(path), dimensions, quantized, written)
            ask = getattr(session, "get_provider_graph_assignment_info", None)
            assigned = None if ask is None else [(each.ep_name, each.get_nodes()) for each in ask()]
            model = onnx.load(written, load_external_data=False)
        if assigned is None:
            return model, None
        others = Counter(node.op_type for name, nodes in assigned if name != self.provider for node in nodes)
        return model, dict(others.most_common())

    def _session(self, model: bytes | str, dimensions: Mapping[str, int] | None = None) -> RunGraph:
        """A function that runs an ONNX model, as `onnx_session` takes it.

        Raises:
            ExportError: If ONNX Runtime does not accept the model.
        """
        return _bound(self._start(model, dimensions, self.quantize == "static"))

    def _start(
        self,
        model: bytes | str,
        dimensions: Mapping[str, int] | None,
        quantized: bool,
        optimized: Path | None = None,
    ) -> Any:
        """A session of an ONNX model.

        Args:
            model: Serialised, or the path of its file.
            dimensions: Name -> size of the symbolic dimensions, which become static.
            quantized: Whether its products are quantized in constant ranges.
            optimized: Where the optimised model is written.

        Raises:
            ExportError: If ONNX Runtime does not accept the model.
        """
        unfused = UNFUSED if quantized else None
        written = None if optimized is None else str(optimized)
        try:
            session = onnx_session(model, self.provider, self._threads(), dimensions, unfused, written)
        except Exception as error:  # its errors have no common base class
            raise ExportError(f"ONNX Runtime does not accept the model: {error}") from error
        if session.get_providers()[0] != self.provider:
            raise ArgumentError(f"`provider` must be one that starts here, got {self.provider!r}, which did not.")
        return session

    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads


@contextmanager
def _stored(model: Any) -> Iterator[bytes | str]:
    """An ONNX model as it is given to a session: serialised, or the path of a file where it is too large for that."""
    if not is_large(model):
        yield model.SerializeToString()
        return
    with TemporaryDirectory(prefix="lightning-prune-") as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        yield str(path)


def _content(path: Path) -> bytes | str:
    """What is given to a session of a file: its content, or its path where weights are next to it."""
    return str(path) if path.with_name(f"{path.name}.data").exists() else path.read_bytes()


def _bound(session: Any) -> RunGraph:
    """A function that runs a session on the memory of torch tensors."""
    inputs = [each.name for each in session.get_inputs()]
    outputs = session.get_outputs()
    dtypes = [_TORCH_DTYPES[each.type] for each in outputs]

    def run(*tensors: Tensor) -> list[Tensor]:
        binding = session.io_binding()
        held = [tensor.contiguous() for tensor in tensors]
        device = held[0].device
        place = device.type, device.index or 0
        for name, tensor in zip(inputs, held, strict=True):
            kind = NUMPY_DTYPES[tensor.dtype]
            binding.bind_input(name, *place, kind, tuple(tensor.shape), tensor.data_ptr())
        made = [
            torch.empty(tuple(each.shape), dtype=dtype, device=device)
            for each, dtype in zip(outputs, dtypes, strict=True)
        ]
        for each, tensor in zip(outputs, made, strict=True):
            kind = NUMPY_DTYPES[tensor.dtype]
            binding.bind_output(each.name, *place, kind, tuple(tensor.shape), tensor.data_ptr())
        if device.type != "cpu":
            torch.cuda.current_stream(device).synchronize()  # the session runs on a stream of its own
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return made

    return run


_TORCH_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
