"""Whole models in the portable form: the same outputs as in the native form, and ONNX graphs that accelerators take."""

import re
from collections.abc import Iterator
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from helpers import ROOT
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.reduction import VWTInter, portable_graph

from .huggingface_models import build_hf, outputs_of
from .sweep import coverage

pytestmark = pytest.mark.long
REFUSED = {"Loop", "If", "Scan", "NonZero", "Unique", "Compress", "TopK", "CumSum", "GatherElements", "GatherND"}
PAIRS = [("vwt-intra", "pomt"), ("tome", "pomt-nearest"), ("topk", "evit")]
PAIRS += [("pitome", "soft-merge"), ("diffrate-merge", "tome:order=concatenated")]


def deit() -> Any:
    return tiny_vit("deit_tiny_patch16_224", depth=2, noise=0.1)


def export(model: nn.Module, images: Tensor, **options: Any) -> onnx.ModelProto:
    with torch.no_grad(), portable_graph():
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False, **options)
    assert program is not None
    return program.model_proto


def nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph or function, those of its subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from nodes(inner)


def check_operators(proto: onnx.ModelProto) -> None:
    """No control flow, no shape that depends on data, nothing sorted or scattered; gathers by constants only."""
    assert not proto.functions
    found = list(nodes(proto.graph))
    kinds = {node.op_type for node in found}
    assert not kinds & REFUSED
    assert not any(kind.startswith("Scatter") for kind in kinds)
    constants = {tensor.name for tensor in proto.graph.initializer}
    constants |= {name for node in found if node.op_type == "Constant" for name in node.output}
    assert all(node.input[1] in constants for node in found if node.op_type == "Gather")


def documented(method: str) -> set[str]:
    """The operators of a method in the portable form, as docs/operators.md lists them, and those of the dense model."""
    text = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{method.partition(':')[0]}` \|.*\|([^|]*)\|$", text, flags=re.MULTILINE)
    dense = re.search(r"are left out:(.*?)\n\n", text, flags=re.DOTALL)
    assert row is not None
    assert dense is not None
    return set(re.findall(r"\b[A-Z]\w+", row[1] + dense[1]))


def check_parity(proto: onnx.ModelProto, model: nn.Module, images: Tensor) -> None:
    """ONNX Runtime gives the outputs of the native form in PyTorch."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("methods", PAIRS, ids="+".join)
def test_onnx_graph(methods: tuple[str, str]) -> None:
    """Two methods in two blocks; the second continues from what the first has left."""
    model, images = deit(), noise_images(2, size=32)
    lp.patch(model, lp.Schedule([5, 4], method=methods))
    proto = export(model, images)
    check_operators(proto)
    assert {node.op_type for node in nodes(proto.graph)} <= documented(methods[0]) | documented(methods[1])
    check_parity(proto, model, images)


def test_onnx_graph_for_any_batch() -> None:
    model = deit()
    lp.patch(model, lp.Schedule([5, 4], method=["shift", "random"]))
    batch = torch.export.Dim("batch", min=1, max=64)
    proto = export(model, noise_images(2, size=32), dynamic_shapes=({0: batch},))
    check_operators(proto)
    for size in (1, 3):
        check_parity(proto, model, noise_images(size, size=32, seed=size))


def test_onnx_graph_of_visual_words() -> None:
    model, images = deit(), noise_images(2, size=32)
    words = lp.learn_vocabulary([images], patch_size=8, words=4)
    lp.patch(model, VWTInter(words, threshold=0.95, pad_to="image"))
    proto = export(model, images)
    check_operators(proto)
    assert {node.op_type for node in nodes(proto.graph)} <= documented("vwt-inter")
    check_parity(proto, model, images)


def timm_model(name: str, **options: Any) -> Any:
    return lambda: coverage.stir(coverage.build_small(name, **options))


MODELS: dict[str, Any] = {
    "class-token": lambda: tiny_vit(noise=0.1),
    "pooling": lambda: tiny_vit(class_token=False, global_pool="avg", noise=0.1),
    "rotary": timm_model("eva02_tiny_patch14_224"),
    "rotary-of-each-head": timm_model("vit_base_patch16_rope_mixed_224"),
    "bias-of-each-block": timm_model("beitv2_base_patch16_224"),
    "shared-bias": timm_model("vit_srelpos_small_patch16_224"),
    "hugging-face": lambda: build_hf("DINOv3ViTModel"),
}
SCHEDULES = {
    "pomt": lp.Schedule([0, 3, 4, 0], "pomt"),
    "tome": lp.Schedule([3, 4, 0, 2], "tome"),
    "mixed": lp.Schedule([0, 3, 4, 2], [None, "tome", "topk", "pomt-nearest"]),
}
CASES = [("class-token", "mixed"), *((name, method) for name in MODELS for method in ("pomt", "tome"))]


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_positions_sizes_and_pooling(name: str, schedule: str) -> None:
    """Position inputs and sizes follow the tokens from block to block, as in the native form."""
    model = MODELS[name]()
    images = noise_images(2, size=20 if name == "hugging-face" else coverage.image_size(model))
    with torch.no_grad(), lp.patch(model, SCHEDULES[schedule]):
        native = model(images)
        with portable_graph():
            portable = model(images)
    if name == "hugging-face":
        native, portable = outputs_of(native), outputs_of(portable)
    torch.testing.assert_close(portable, native, rtol=1e-4, atol=1e-5)
