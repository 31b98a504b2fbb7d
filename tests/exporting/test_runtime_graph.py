"""What a runtime makes of an exported model, read from graphs that are known."""

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from lightning_prune.exporting.exported_graph import graph_of
from lightning_prune.exporting.onnx_format import OnnxFormat
from lightning_prune.exporting.openvino_format import OpenVINOFormat
from lightning_prune.exporting.runtime_graph import Fusion, RuntimeGraph, graph_in_onnxruntime

IMAGES = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))


def onnx_model(*nodes: tuple[str, str, str]) -> onnx.ModelProto:
    """Of operators, each with one input and one output."""
    made = [helper.make_node(kind, [source], [target]) for kind, source, target in nodes]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "z")]
    return helper.make_model(helper.make_graph(made, "graph", ends[:1], ends[1:]))


def test_softmax_counts_as_attention_where_it_is_multiplied() -> None:
    scores = ("Softmax", "a", "b"), ("Cast", "b", "c"), ("MatMul", "c", "d")
    ranks = ("Softmax", "d", "e"), ("ReduceMean", "e", "z")
    graph = graph_in_onnxruntime(onnx_model(*scores, *ranks), {})
    assert graph.attention == Fusion(0, 1)
    assert graph.layer_norm == Fusion(0, 0)
    assert graph.operators == {"Softmax": 2, "Cast": 1, "MatMul": 1, "ReduceMean": 1}


def test_what_cannot_be_told_apart_is_not_known() -> None:
    graph = graph_in_onnxruntime(onnx_model(("Exp", "a", "b"), ("Sqrt", "b", "c"), ("Erf", "c", "z")), None)
    assert (graph.attention.unfused, graph.layer_norm.unfused) == (None, None)
    assert graph.gelu == Fusion(0, 1)
    assert graph.elsewhere is None
    assert RuntimeGraph.from_dict(graph.to_dict()) == graph


class Parts(nn.Module):
    """One of each part that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        values = self.layer(self.norm(images))
        mixed = nn.functional.scaled_dot_product_attention(values, values, values)
        return nn.functional.gelu(self.layer(mixed))


def parts(format: Any, folder: Path) -> RuntimeGraph:
    format.write(format.convert(graph_of(Parts().eval(), IMAGES), None, False), folder)
    graph = format.in_runtime(folder, tuple(IMAGES.shape))
    assert isinstance(graph, RuntimeGraph)
    return graph


def test_onnx_runtime(tmp_path: Path) -> None:
    graph = parts(OnnxFormat(), tmp_path)
    assert graph.attention.fused + (graph.attention.unfused or 0) == 1
    assert graph.layer_norm == Fusion(1, 0)
    assert graph.gelu == Fusion(1, 0)
    assert graph.elsewhere == {}


def test_openvino(tmp_path: Path) -> None:
    graph = parts(OpenVINOFormat(), tmp_path)
    assert graph.attention.fused + (graph.attention.unfused or 0) == 1
    assert graph.layer_norm == Fusion(1, None)
    assert graph.gelu.fused + (graph.gelu.unfused or 0) == 1
    assert graph.elsewhere is not None
    assert graph.precisions is not None
    assert set(graph.precisions) <= {"f32", "i32"}
    assert "Const" not in graph.operators
