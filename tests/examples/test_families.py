"""Every family of models in ONNX Runtime and OpenVINO: two methods in one graph, pruning early and merging late."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.patching import find_vision_transformer
from lightning_prune.runtimes import onnx_conversion, onnx_runtime, openvino_runtime, parse_runtime
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import ExportedGraph, export_graph

pytestmark = pytest.mark.long
SPECS = ("onnxruntime", "openvino")
FAMILIES = (
    *("DeiT", "DeiT, distilled", "DINOv2, registers", "CLIP", "SigLIP", "ViT, parallel blocks"),
    *("ViT, differential parallel", "EVA-02", "DINOv3", "BEiT", "ViT, relative positions", "NaFlexViT"),
    *("CaiT", "ConViT", "torchvision ViT", "Hugging Face DINOv2", "OpenCLIP"),
    *("Qwen3-VL encoder", "DeepSeek-VL encoder", "Gemma 4 encoder"),
)


@pytest.fixture
def sweep(program: Any) -> Any:
    return program("export_sweep")


def test_these_are_all(sweep: Any) -> None:
    assert tuple(sweep.FAMILIES) == FAMILIES


PAIRS = (("pomt", "tome"), ("pomt-nearest", "tome"), ("topk", "pomt"))


def mixed(model: nn.Module, restore: Any) -> lp.PatchHandle:
    """POMT in the first block that can reduce and ToMe in the next; other pairs for families that cannot have both.

    Where patch tokens are pooled nothing can be dropped before a merge, and CaiT cannot weight merged tokens.
    """
    transformer = find_vision_transformer(model, restore=restore)
    first, depth = transformer.first_prunable_block, transformer.depth
    removed = [4 if block in (first, first + 1) else 0 for block in range(depth)]
    for early, late in PAIRS:
        methods = [early if block == first else late for block in range(depth)]
        try:
            # The tail would take the place of the second.
            return lp.patch(model, lp.Schedule(removed, methods), tail=False, restore=restore)
        except lp.UnsupportedModelError as error:
            refused = error
    raise refused


@pytest.fixture(autouse=True)
def converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runtimes read the same ONNX graph, which takes most of the time to make."""
    made: dict[int, Any] = {}

    def convert(graph: ExportedGraph, *args: Any, **options: Any) -> Any:
        if id(graph) not in made:
            made[id(graph)] = onnx_conversion.to_onnx(graph, *args, **options)
        return made[id(graph)]

    monkeypatch.setattr(onnx_runtime, "to_onnx", convert)
    monkeypatch.setattr(openvino_runtime, "to_onnx", convert)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_both_runtimes(family: str, sweep: Any) -> None:
    model = sweep.build(family)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *sweep.image_size(model), generator=generator)
    others = torch.randn(2, 3, *sweep.image_size(model), generator=generator)
    with mixed(model, "auto" if family in sweep.RESTORED else None), torch.no_grad():
        graph = export_graph(model, (images,))
        expected = outputs_of(model(others))
        for spec in SPECS:
            runtime = parse_runtime(spec)
            assert isinstance(runtime, ConvertedRuntime)
            torch.testing.assert_close(run(runtime, graph, others), expected, rtol=1e-4, atol=1e-4)


def run(runtime: ConvertedRuntime, graph: ExportedGraph, images: Tensor) -> Tensor:
    return outputs_of(graph.unflatten(runtime.load(graph)(images)))


def outputs_of(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output.logits
    return tensor
