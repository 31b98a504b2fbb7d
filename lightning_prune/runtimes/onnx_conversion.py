"""Converting an exported graph to ONNX."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lightning_prune.errors import ExportError
from lightning_prune.runtimes.graph_export import ExportedGraph

NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.bool: np.bool_}
"""dtypes that graphs exchange with PyTorch."""


def to_onnx(graph: ExportedGraph, opset: int | None = None, dimension: str | None = None) -> Any:
    """The ONNX model of a graph, as an `onnx.ModelProto`.

    Args:
        graph: Of a module, with static shapes, or with one dynamic dimension.
        opset: Version of the operators; that of PyTorch's exporter if None.
        dimension: What the dynamic dimension of the inputs is called in the model; the exporter invents a name.

    Raises:
        ExportError: If an operator has no ONNX form; names it.
    """
    try:
        with _quiet():
            made = torch.onnx.export(graph.program, graph.inputs, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # the exporter's errors are private
        raise ExportError(f"The graph cannot be converted to ONNX: {_innermost(error)}") from error
    assert made is not None
    model = made.model_proto
    _remove_traces(model)
    if dimension is not None:
        _name_dimension(model, dimension)
    return model


def _remove_traces(model: Any) -> None:
    """Removes what the exporter notes of each operator: lines of source, with the paths of files on this machine."""
    graph = model.graph
    for each in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del each.metadata_props[:]
    for function in model.functions:
        for each in (function, *function.node):
            del each.metadata_props[:]


def _name_dimension(model: Any, name: str) -> None:
    """Renames the symbol of the dynamic dimension of a model, also where shapes are computed from it."""
    shapes = [each.type.tensor_type.shape.dim for each in (*model.graph.input, *model.graph.value_info)]
    shapes += [each.type.tensor_type.shape.dim for each in model.graph.output]
    symbols = {size.dim_param for each in model.graph.input for size in each.type.tensor_type.shape.dim}
    for symbol in symbols - {""}:
        for size in (size for shape in shapes for size in shape if size.dim_param):
            size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", name, size.dim_param)


def _innermost(error: BaseException) -> str:
    """The first line of the error that began a chain: the exporter wraps it in pages about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about itself, which say nothing of the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
