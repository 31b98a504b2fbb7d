"""Positions that are resampled to the size of the images are constants of a graph; what depends on images is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.runtimes import parse_runtime
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import ExportedGraph, export_graph


class Positions(nn.Module):
    """Images plus positions of a 4 x 4 grid, resampled to their size; and half of the images, to theirs."""

    def __init__(self, of_images: bool = False) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
        self.of_images = of_images

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        size = images.shape[-2:]
        added = F.interpolate(self.positions * 2, size=size, mode="bicubic", antialias=True)
        if self.of_images:
            added = added + F.interpolate(images[..., ::2, ::2], size=size)
        return {"sum": images + added.expand(images.shape[0], -1, -1, -1)}


def resampled(graph: ExportedGraph) -> list[str]:
    return [node.name for node in graph.program.graph.nodes if "upsample" in str(node.target)]


@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_only_what_depends_on_weights_is_a_constant(of_images: bool, dynamic: bool) -> None:
    module, images = Positions(of_images).eval(), torch.randn(2, 3, 6, 10)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    graph = export_graph(module, (images,), dynamic_shapes=shapes)
    assert len(resampled(graph)) == of_images
    others = torch.randn(3 if dynamic else 2, 3, 6, 10)
    with torch.no_grad():
        found, expected = graph.program.module()(others), module(others)
    assert list(found) == ["sum"]
    assert torch.equal(found["sum"], expected["sum"])
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("spec", ["onnxruntime", "openvino"])
def test_runtimes_give_what_pytorch_gives(spec: str) -> None:
    module, images = Positions().eval(), torch.randn(2, 3, 3, 2)  # smaller than the grid: antialiasing matters
    graph, runtime = export_graph(module, (images,)), parse_runtime(spec)
    assert isinstance(runtime, ConvertedRuntime)
    with torch.no_grad():
        torch.testing.assert_close(graph.unflatten(runtime.load(graph)(images)), module(images))
