"""8 bits by the quantizer of ONNX Runtime: products with weights, in the graph that it runs anyway."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import Tensor

from lightning_prune._utils.quiet_loggers import errors_only
from lightning_prune.errors import ExportError

Quantization = Literal["static", "dynamic"]
"""Ranges of activations from calibration images, or those of each batch as it comes."""

UNFUSED = ["MatMulAddFusion"]
"""Optimisations of a session that make floating-point products of quantized ones whose output is not quantized."""

_OPERATORS = ["MatMul", "Gemm"]


def quantized_onnx(
    model: Any, how: Quantization, batches: Sequence[tuple[Tensor, ...]] = (), reduce_range: bool = False
) -> Any:
    """A model whose products with weights are computed in 8 bits; weights have a scale for each output channel.

    Attention and reductions stay in floating point: they multiply activations, which loses more than it gains.

    Args:
        model: An `onnx.ModelProto` in float32.
        how: Where the ranges of activations come from.
        batches: Inputs of the graph, in their order, for `"static"`.
        reduce_range: Whether weights take 7 bits, see `lightning_prune.runtimes.weight_range`.

    Raises:
        ExportError: If the quantizer fails; says how.
    """
    # The quantizer advises to preprocess the model, which its exporter has done.
    with TemporaryDirectory(prefix="lightning-prune-") as folder, errors_only(""):
        path = Path(folder) / "quantized.onnx"
        common = {"per_channel": True, "weight_type": QuantType.QInt8, "op_types_to_quantize": _OPERATORS}
        common["reduce_range"] = reduce_range
        try:
            if how == "dynamic":
                quantize_dynamic(model, path, **common)
            else:
                quantize_static(
                    model,
                    path,
                    _Batches(model, batches),
                    **common,
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    nodes_to_exclude=_without_weights(model),
                    # What follows a product needs floating point: its output would be rounded for nothing.
                    extra_options={"OpTypesToExcludeOutputQuantization": _OPERATORS},
                )
        except Exception as error:  # its errors have no common base class
            raise ExportError(f"ONNX Runtime cannot quantize the model: {type(error).__name__}: {error}") from error
        return onnx.load(path)


class _Batches(CalibrationDataReader):
    """The inputs of a graph by name, batch by batch."""

    def __init__(self, model: Any, batches: Sequence[tuple[Tensor, ...]]) -> None:
        names = [each.name for each in model.graph.input]
        self._left = iter([dict(zip(names, (t.cpu().numpy() for t in batch), strict=True)) for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None after the last one."""
        return next(self._left, None)


def _without_weights(model: Any) -> list[str]:
    """Names of the products of two activations."""
    weights = {each.name for each in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type in _OPERATORS and node.input[1] not in weights]
