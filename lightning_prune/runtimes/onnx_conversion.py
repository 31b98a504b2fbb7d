"""Converting an exported graph to ONNX."""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_prune._utils.quiet_loggers import errors_only
from lightning_prune.errors import ExportError
from lightning_prune.runtimes.graph_export import ExportedGraph

NUMPY_DTYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.uint8: np.uint8,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}
"""dtypes that graphs exchange with PyTorch."""
_EXPORTED = 18
"""Oldest version of the operators that PyTorch's exporter gives."""
_NOOP = "noop_with_empty_axes"
_KEPT = "lightning_prune.kept"
_SMALL_BYTES = 1024
"""Weights below this stay in the file of the graph."""
MESSAGE_BYTES = 2**31 - 2**24
"""Weights in one message of Protocol Buffers, which holds 2 GiB in all."""


def to_onnx(graph: ExportedGraph, opset: int | None = None, dimension: str | None = None) -> Any:
    """The ONNX model of a graph, as an `onnx.ModelProto`.

    Args:
        graph: Of a module, with static shapes, or with one dynamic dimension.
        opset: Version of the operators; that of PyTorch's exporter if None.
        dimension: What the dynamic dimension of the inputs is called in the model; the exporter invents a name.

    Raises:
        ExportError: If an operator has no ONNX form, or none in this version; names it.
    """
    try:
        with _quiet():
            asked = None if opset is None else max(opset, _EXPORTED)
            made = torch.onnx.export(graph.program, graph.inputs, dynamo=True, opset_version=asked, verbose=False)
    except Exception as error:  # the exporter's errors are private
        raise ExportError(f"The graph cannot be converted to ONNX: {_innermost(error)}") from error
    assert made is not None
    _keep_constants(made.model.graph)
    model = made.model_proto
    if opset is not None and opset < _EXPORTED:
        model = _older(model, opset)
    _remove_traces(model)
    if dimension is not None:
        _name_dimension(model, dimension)
    return model


def _keep_constants(graph: Any) -> None:
    """Adds the constants of a graph of the exporter that it lost.

    Its optimizer replaces a minimum and a maximum by `Clip`, and names the bounds after the tensor: where two operators
    clip one tensor, the graph keeps the bounds of the last alone, and no runtime accepts it.
    """
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.graph is None:
                value.name = _unused(f"{value.name}_of_{node.name}", graph.initializers)
                graph.register_initializer(value)


def _unused(name: str, names: Iterable[str]) -> str:
    """The name, or the first with a number behind it that is not among `names`."""
    return next(each for each in chain([name], (f"{name}_{i}" for i in count(1))) if each not in names)


def _remove_traces(model: Any) -> None:
    """Removes what the exporter notes of each operator: lines of source, with the paths of files on this machine."""
    graph = model.graph
    for each in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del each.metadata_props[:]
    for function in model.functions:
        for each in (function, *function.node):
            del each.metadata_props[:]


def _older(model: Any, opset: int) -> Any:
    """An ONNX model in an older version of the operators than PyTorch's exporter gives, by the converter of ONNX.

    PyTorch's exporter calls it, too, but without the weights, and some of them are axes that become attributes; and
    where that fails, it says nothing and keeps the version.
    """
    import onnx
    from onnx.version_converter import convert_version

    # The converter knows no way back for Split, whose older form differs by an attribute with a count alone.
    splits = [node for node in model.graph.node if node.op_type == "Split"]
    for node in splits:
        node.domain = _KEPT
    model.opset_import.append(onnx.helper.make_opsetid(_KEPT, 1))
    try:
        converted = convert_version(model, opset)
    except Exception as error:  # a RuntimeError, and private ones of its C++ code
        reason = str(error).strip().partition("\n")[0].rpartition("failed: ")[2]
        raise ExportError(
            f"`opset` must be one to which the graph can be converted, got {opset}: {reason}. Leave it out, or give a "
            "newer one."
        ) from error
    for node in converted.graph.node:
        if node.domain == _KEPT:
            node.domain = ""
            _remove(node, "num_outputs")
        elif node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            _remove(node, _NOOP)  # the converter leaves it
    for each in [each for each in converted.opset_import if each.domain == _KEPT]:
        converted.opset_import.remove(each)
    return converted


def _remove(node: Any, name: str) -> None:
    """Removes an attribute of an operator; that of reductions only where it is off, which older ones cannot say."""
    for attribute in [each for each in node.attribute if each.name == name and (name != _NOOP or not each.i)]:
        node.attribute.remove(attribute)


def save_onnx(model: Any, path: Path) -> list[str]:
    """Writes an ONNX model; weights beyond what a file of ONNX can hold go to a second one, the name with `.data`.

    Args:
        model: An `onnx.ModelProto`; it keeps no large weights if they go to the second file.
        path: The file.

    Returns:
        The names of the files that were written.

    Raises:
        OSError: If a file cannot be written.
    """
    if not is_large(model):
        path.write_bytes(model.SerializeToString())
        return [path.name]
    import onnx
    from onnx.external_data_helper import set_external_data

    weights = f"{path.name}.data"
    # By hand, as `onnx.save_model` refuses a name that a file of the current folder has.
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= _SMALL_BYTES:
            set_external_data(tensor, weights)
    onnx.save_model(model, path)
    return [path.name, weights]


def is_large(model: Any) -> bool:
    """Whether an ONNX model is too large for one message of Protocol Buffers, and so for one file."""
    return sum(len(each.raw_data) for each in model.graph.initializer) > MESSAGE_BYTES


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
    with errors_only("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
