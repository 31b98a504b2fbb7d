"""Conversion to ONNX keeps all constants of a graph."""

from math import inf

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.runtimes import parse_runtime
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import export_graph


class ClipsOneTensor(nn.Module):
    """Clips one tensor to several intervals, as the linear layers of queries, keys and values of Gemma 4 do."""

    BOUNDS = ((-1.0, 1.0), (-0.5, 0.2), (-inf, inf))

    def __init__(self) -> None:
        super().__init__()
        for index, (low, high) in enumerate(self.BOUNDS):
            self.register_buffer(f"low_{index}", torch.tensor(low))
            self.register_buffer(f"high_{index}", torch.tensor(high))

    def forward(self, values: Tensor) -> Tensor:
        doubled = values * 2
        bounds = [(self.get_buffer(f"low_{each}"), self.get_buffer(f"high_{each}")) for each in range(len(self.BOUNDS))]
        return torch.stack([torch.clamp(doubled, low, high) for low, high in bounds])


@pytest.mark.parametrize("spec", ["onnxruntime", "openvino"])
def test_a_tensor_that_is_clipped_twice_keeps_both_bounds(spec: str) -> None:
    module, values = ClipsOneTensor().eval(), torch.linspace(-2, 2, 15).reshape(3, 5)
    graph, runtime = export_graph(module, (values,)), parse_runtime(spec)
    assert isinstance(runtime, ConvertedRuntime)
    expected = torch.stack([(values * 2).clamp(low, high) for low, high in ClipsOneTensor.BOUNDS])
    torch.testing.assert_close(graph.unflatten(runtime.load(graph)(values)), expected)
