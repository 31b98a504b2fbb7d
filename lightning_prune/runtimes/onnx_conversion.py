"""Converting an exported graph to ONNX."""

import logging
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


def to_onnx(graph: ExportedGraph, opset: int | None = None) -> Any:
    """The ONNX model of a graph, as an `onnx.ModelProto`.

    Args:
        graph: Of a module, with static shapes, or with named dynamic ones.
        opset: Version of the operators; that of PyTorch's exporter if None.

    Raises:
        ExportError: If an operator has no ONNX form; names it.
    """
    try:
        with _quiet():
            made = torch.onnx.export(graph.program, graph.inputs, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # the exporter's errors are private
        raise ExportError(f"The graph cannot be converted to ONNX: {_innermost(error)}") from error
    assert made is not None
    return made.model_proto


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
