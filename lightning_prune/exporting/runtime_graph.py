"""What a runtime makes of an exported model: its operators after optimisation, and what is not fused or falls back."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_ONNX_ATTENTION = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "QAttention"}
_ONNX_LAYER_NORM = {"LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"}
_ONNX_GELU = {"Gelu", "BiasGelu", "FastGelu", "QuickGelu"}
_PRODUCTS = {"MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul"}
_PASSES_ON = {"Cast", "Dropout", "Identity", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Fusion:
    """How often a part of a transformer is one operator in the runtime.

    Attributes:
        fused: Operators that compute it as one.
        unfused: Places where it is several operators; None where that cannot be known.
    """

    fused: int
    unfused: int | None


@dataclass(frozen=True)
class RuntimeGraph:
    """The graph that a runtime executes, as it says itself.

    Attributes:
        operators: Operator -> how often it is executed, after optimisation, the most frequent first.
        attention: Softmax of scores times values.
        layer_norm: Layer normalisation.
        gelu: The activation.
        elsewhere: Operator -> how often it does not run where it should: by the CPU instead of the provider that was
            asked for, in ONNX Runtime; by a reference implementation, in OpenVINO; by a kernel of its own, in
            AOTInductor and ExecuTorch, instead of compiled code or XNNPACK. None where the runtime does not say.
        precisions: Precision -> operators whose output has it; None where the runtime does not say.
    """

    operators: Mapping[str, int]
    attention: Fusion
    layer_norm: Fusion
    gelu: Fusion
    elsewhere: Mapping[str, int] | None
    precisions: Mapping[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RuntimeGraph":
        """The inverse of `to_dict`."""
        fusions = {name: Fusion(**values[name]) for name in ("attention", "layer_norm", "gelu")}
        return cls(**{**values, **fusions})


def graph_in_onnxruntime(model: Any, elsewhere: Mapping[str, int] | None) -> RuntimeGraph:
    """Reads the optimised model of ONNX Runtime.

    Args:
        model: An `onnx.ModelProto`, as a session writes it.
        elsewhere: See `RuntimeGraph`.
    """
    nodes = list(model.graph.node)
    counts = Counter(node.op_type for node in nodes)
    consumers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    softmax = [node for node in nodes if node.op_type == "Softmax"]
    unfused = sum(any(_multiplies(each, consumers) for each in consumers.get(node.output[0], [])) for node in softmax)
    return RuntimeGraph(
        operators=dict(counts.most_common()),
        # A softmax without a kernel, as in float16, becomes several operators, an exponential among them.
        attention=Fusion(_sum(counts, _ONNX_ATTENTION), None if counts["Exp"] else unfused),
        # What divides by a square root may be a layer norm, and may be a method that normalises keys.
        layer_norm=Fusion(_sum(counts, _ONNX_LAYER_NORM), None if counts["Sqrt"] else 0),
        gelu=Fusion(_sum(counts, _ONNX_GELU), counts["Erf"]),
        elsewhere=elsewhere,
    )


def graph_in_openvino(model: Any) -> RuntimeGraph:
    """Reads the model that OpenVINO executes.

    Args:
        model: What `get_runtime_model` of a compiled model returns.
    """
    nodes = [(node, _notes(node)) for node in model.get_ordered_ops()]
    executed = [(node, notes) for node, notes in nodes if notes["layerType"] not in _OPENVINO_NO_OPERATORS]
    kinds = Counter(notes["layerType"] for _, notes in executed)
    # What an operator was made of: the names of operators of the file, each ending in its type.
    parts = [(notes["layerType"], _types(notes["originalLayersNames"])) for _, notes in executed]
    attention = sum(kind in _OPENVINO_ATTENTION or _is_attention(types) for kind, types in parts)
    softmax = [node for node, notes in executed if notes["layerType"] == "Softmax"]
    products = [any(_notes(target)["layerType"] in _OPENVINO_PRODUCTS for target in _targets(node)) for node in softmax]
    gelu = [types for _, types in parts if "Gelu" in types]
    reference = Counter(notes["layerType"] for _, notes in executed if notes["primitiveType"].startswith("ref"))
    return RuntimeGraph(
        operators=dict(kinds.most_common()),
        attention=Fusion(attention, sum(products)),
        layer_norm=Fusion(kinds["MVN"] + kinds["RMS"], None),
        gelu=Fusion(sum(len(types) > 1 for types in gelu), sum(len(types) == 1 for types in gelu)),
        elsewhere=dict(reference.most_common()),
        precisions=dict(Counter(notes["runtimePrecision"] for _, notes in executed).most_common()),
    )


def graph_in_aotinductor(compiled: Mapping[str, int], others: Mapping[str, int]) -> RuntimeGraph:
    """Reads what AOTInductor compiled.

    Args:
        compiled: Kernel that was compiled, named after the operators in it -> how often it is called.
        others: Operator -> how often a kernel of PyTorch's own is called for it.
    """
    counts = Counter(compiled) + Counter(others)

    def number(counted: Mapping[str, int], part: str) -> int:
        return sum(count for name, count in counted.items() if part in name)

    return RuntimeGraph(
        operators=dict(counts.most_common()),
        attention=Fusion(number(others, "scaled_dot_product"), None),
        layer_norm=Fusion(number(compiled, "layer_norm"), number(others, "layer_norm")),
        gelu=Fusion(number(compiled, "gelu"), number(others, "gelu")),
        elsewhere=dict(Counter(others).most_common()),
    )


def graph_in_executorch(delegated: Mapping[str, int], others: Mapping[str, int]) -> RuntimeGraph:
    """Reads what ExecuTorch says of a lowered graph.

    Args:
        delegated: Operator -> how often XNNPACK runs it.
        others: Operator -> how often ExecuTorch's own kernels run it.
    """
    counts = Counter(delegated) + Counter(others)
    return RuntimeGraph(
        operators=dict(counts.most_common()),
        attention=Fusion(counts["aten_scaled_dot_product_attention_default"], counts["aten__softmax_default"]),
        layer_norm=Fusion(counts["aten_native_layer_norm_default"], None),
        gelu=Fusion(counts["aten_gelu_default"], None),
        elsewhere=dict(Counter(others).most_common()),
    )


_OPENVINO_NOTES = ("layerType", "primitiveType", "runtimePrecision", "originalLayersNames")
_OPENVINO_ATTENTION = {"ScaledDotProductAttention", "ScaledDotProductAttentionWithKVCache"}
_OPENVINO_PRODUCTS = {"MatMul", "FullyConnected"}
_OPENVINO_NO_OPERATORS = {"Const", "Constant", "Input", "Parameter", "Output", "Result"}


def _sum(counts: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(counts[name] for name in names if name in counts)


def _multiplies(node: Any, consumers: Mapping[str, list[Any]]) -> bool:
    """Whether a node is a product, or hands its input on to one."""
    if node.op_type in _PRODUCTS:
        return True
    following = consumers.get(node.output[0], []) if node.op_type in _PASSES_ON else []
    return any(_multiplies(each, consumers) for each in following)


def _notes(node: Any) -> dict[str, str]:
    """What OpenVINO notes of an operator that it executes."""
    notes = node.get_rt_info()
    return {name: str(notes[name].astype(str)) if name in notes else "" for name in _OPENVINO_NOTES}


def _types(names: str) -> list[str]:
    """The types of operators, from their names, as in `gelu/aten.gelu.default/Gelu`."""
    return [name.rpartition("/")[2] for name in names.split(",") if name]


def _is_attention(types: list[str]) -> bool:
    """Whether one operator computes the softmax and the products of an attention."""
    return "ScaledDotProductAttention" in types and len(types) > 1


def _targets(node: Any) -> list[Any]:
    return [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]
