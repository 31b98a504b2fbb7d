"""8 bits by NNCF, the quantizer of OpenVINO."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nncf
import rich
from nncf.quantization.advanced_parameters import OverflowFix
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from torch import Tensor

from lightning_prune.errors import ExportError

_NOT_IN_8_BITS = ["Gather", "GatherElements"]
"""Picking tokens from 8 bits ends the process in the CPU plugin of OpenVINO 2026.4."""


def quantized_openvino(model: Any, batches: Sequence[tuple[Tensor, ...]], reduce_range: bool = False) -> Any:
    """A model whose products with weights, and attention, are computed in 8 bits, by NNCF's scheme for transformers.

    Reductions stay in floating point.

    Args:
        model: An `openvino.Model` in float32; it may be changed.
        batches: Inputs of the model, in their order.
        reduce_range: Whether weights take 7 bits, see `lightning_prune.runtimes.weight_range`.

    Raises:
        ExportError: If the quantizer fails; says how.
    """
    inputs = [[tensor.cpu().numpy() for tensor in batch] for batch in batches]
    # Ranges over all images, not the mean of those of each batch: they must not depend on the batch size.
    ranges = RangeEstimatorParametersSet.MINMAX
    fix = OverflowFix.ENABLE if reduce_range else None  # which leaves it to NNCF
    try:
        with _quiet():
            return nncf.quantize(
                model,
                nncf.Dataset(inputs),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(inputs),
                ignored_scope=nncf.IgnoredScope(names=_without_weights(model), types=_NOT_IN_8_BITS, validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=fix, activations_range_estimator_params=ranges
                ),
            )
    except Exception as error:  # its errors have no common base class
        raise ExportError(f"NNCF cannot quantize the model: {type(error).__name__}: {error}") from error


def _without_weights(model: Any) -> list[str]:
    """Names of the products of two activations, as reductions have them; attention is an operator of its own."""
    products = [node for node in model.get_ops() if node.get_type_name() == "MatMul"]
    return [node.get_friendly_name() for node in products if not any(map(_is_weight, _inputs(node)))]


def _is_weight(node: Any) -> bool:
    """Whether a node is made of constants alone."""
    inputs = _inputs(node)
    return all(map(_is_weight, inputs)) if inputs else node.get_type_name() == "Constant"


def _inputs(node: Any) -> list[Any]:
    return [node.input_value(index).get_node() for index in range(node.get_input_size())]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's bars, which go to the console of rich that programs share, and its remarks."""
    console = rich.get_console()
    quiet, console.quiet = console.quiet, True
    nncf.set_log_level(logging.ERROR)
    try:
        yield
    finally:
        console.quiet = quiet
