"""The range of 8-bit weights: where it is halved, and what the graphs and the outputs show of that."""

import platform
from collections.abc import Iterator

import onnx
import pytest
import torch
from onnx import numpy_helper

from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.errors import ArgumentError
from lightning_prune.runtimes import parse_runtime
from lightning_prune.runtimes.calibration import calibrating_with
from lightning_prune.runtimes.graph_export import export_graph
from lightning_prune.runtimes.weight_range import reduces_range, sums_saturate

IMAGES = noise_images(16)
QUANTIZED = ("onnxruntime:quantize=static", "onnxruntime:quantize=dynamic", "openvino:quantize=int8")


@pytest.fixture
def _not_known() -> Iterator[None]:
    sums_saturate.cache_clear()
    yield
    sums_saturate.cache_clear()


@pytest.mark.usefixtures("_not_known")
@pytest.mark.parametrize(
    ("machine", "has", "saturates"),
    [
        ("x86_64", ["avx2"], True),
        ("AMD64", ["avx2", "avx512_f", "avx512_bw"], True),
        ("x86_64", ["avx2", "avx_vnni"], False),
        ("x86_64", ["avx512_f", "avx512_vnni"], False),
        ("x86_64", ["amx_int8"], False),
        ("aarch64", ["neon"], False),
        ("arm64", ["neon", "dot"], False),
    ],
)
def test_processors(monkeypatch: pytest.MonkeyPatch, machine: str, has: list[str], saturates: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True) | {"avx10_2": False})
    assert sums_saturate() is saturates
    assert reduces_range(None, on_cpu=True) is saturates
    assert reduces_range(None, on_cpu=False) is False
    assert all(reduces_range(asked, on_cpu) is asked for asked in (True, False) for on_cpu in (True, False))


@pytest.mark.parametrize("spec", QUANTIZED)
def test_settings(spec: str) -> None:
    halved, whole = (parse_runtime(f"{spec},reduce_range={value}") for value in ("true", "false"))
    assert (halved.name, whole.name) == (f"{spec},reduce_range=True", f"{spec},reduce_range=False")
    assert parse_runtime(halved.name).name == halved.name
    assert halved.context()["quantization"] == f"{whole.context()['quantization']}, weights in 7 bits"
    expected = halved if sums_saturate() else whole
    assert parse_runtime(spec).context()["quantization"] == expected.context()["quantization"]
    with pytest.raises(ArgumentError, match="reduce_range"):
        parse_runtime(f"{spec},reduce_range=3")
    plain = parse_runtime(f"{spec.partition(':')[0]}:reduce_range=true")
    assert "quantization" not in plain.context()
    assert plain.unquantized == plain
    assert plain.quantized().unquantized == plain
    assert plain.quantized().context()["quantization"].endswith("weights in 7 bits")


@pytest.mark.parametrize("how", ["static", "dynamic"])
@pytest.mark.parametrize(("value", "largest"), [("true", 64), ("false", 127)])
def test_weights_of_onnx(how: str, value: str, largest: int) -> None:
    runtime = parse_runtime(f"onnxruntime:quantize={how},reduce_range={value}")
    with calibrating_with(IMAGES):
        model: onnx.ModelProto = runtime._onnx(export_graph(tiny_vit(depth=1), (IMAGES[:4],)))  # type: ignore[attr-defined]
    stored = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    found = [int(abs(numpy_helper.to_array(each).astype(int)).max()) for each in stored if len(each.dims) == 2]
    assert len(found) >= 5
    assert {*found} == {largest}


@pytest.mark.parametrize("spec", QUANTIZED)
def test_outputs_here_are_near_those_in_float(spec: str) -> None:
    """With sums that saturate, the largest error is ten times this."""
    model = tiny_vit(depth=2, noise=0.1)
    with torch.no_grad(), calibrating_with(IMAGES):
        expected = model(IMAGES)
        found = parse_runtime(spec).prepare(model, IMAGES)(IMAGES)
    assert float((found - expected).norm() / expected.norm()) < 0.05
