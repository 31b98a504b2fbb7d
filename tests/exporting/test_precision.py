"""Exports in lower precisions than float32: what is written, run and refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.exporting import ExportReport
from lightning_prune.exporting.exported_graph import graph_of
from lightning_prune.exporting.formats import ExportFormat
from lightning_prune.exporting.precision import AGREEMENT, PRECISIONS, TOLERANCES, dtype_of, is_quantized
from lightning_prune.exporting.registry import FORMATS, parse_format
from lightning_prune.exporting.runtime_graph import RuntimeGraph
from lightning_prune.exporting.torch_format import TorchExportFormat
from lightning_prune.patching import find_vision_transformer
from lightning_prune.quantization import Int8Weights
from lightning_prune.runtimes import parse_runtime

IMAGES = noise_images(2)
CALIBRATION = noise_images(12, seed=1)
SCHEDULE = lp.Schedule([4, 0], "topk")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_vit(depth=2, embed_dim=24, noise=0.3, num_classes=2)  # no two logits are near each other


def expected(model: Any) -> Tensor:
    with torch.no_grad(), lp.patch(model, SCHEDULE):
        found: Tensor = model(CALIBRATION)
    return found


def test_every_precision_has_a_tolerance_and_all_but_float32_an_agreement() -> None:
    assert set(TOLERANCES) == set(PRECISIONS)
    assert set(AGREEMENT) == set(PRECISIONS) - {"float32"}
    assert {name: dtype_of(name) for name in PRECISIONS if is_quantized(name)} == {
        "int8": torch.float32,
        "int8-dynamic": torch.float32,
    }
    assert all(set(each.precisions) <= set(PRECISIONS) for each in FORMATS.values())


@pytest.mark.long
@pytest.mark.parametrize(("format", "products"), [("onnx", "QuantizeLinear"), ("openvino", "FakeQuantize")])
def test_int8(model: Any, tmp_path: Path, format: str, products: str, recwarn: pytest.WarningsRecorder) -> None:
    folder = tmp_path / "out"
    options: dict[str, Any] = {"format": format, "precision": "int8", "rounds": 0}
    report = lp.export(model, folder, IMAGES, plan=SCHEDULE, calibration=CALIBRATION, **options)
    assert not [each for each in recwarn if "calibrated" in str(each.message)]
    assert products in report.operators
    assert ExportReport.read(folder) == report
    assert (report.parity.min_agreement, report.parity.token_flips) == (0.9, None)
    found = lp.load_exported(folder)(CALIBRATION)
    error = (found - expected(model)).abs().max() / expected(model).abs().max()
    assert 1e-4 < error < TOLERANCES["int8"]
    graph = report.in_runtime
    assert graph is not None
    if format == "openvino":
        assert graph.precisions is not None
        assert "i8" in graph.precisions
    else:
        assert {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"} & set(graph.operators)
    done = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (folder / "README.md").read_text()
    assert f"in int8 ({report.quantization}); tokens are removed by topk" in text
    assert "at least 90.0% had to agree" in text


@pytest.mark.parametrize("halved", [True, False])
def test_the_range_of_weights_is_that_of_another_machine(model: Any, tmp_path: Path, halved: bool) -> None:
    folder = tmp_path / "out"
    options: dict[str, Any] = {"precision": "int8", "min_agreement": 0, "rounds": 0}
    report = lp.export(model, folder, IMAGES, calibration=CALIBRATION, reduce_range=halved, **options)
    file = onnx.load(folder / "model.onnx")
    weights = [each for each in file.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    largest = {int(abs(onnx.numpy_helper.to_array(each).astype(int)).max()) for each in weights if len(each.dims) == 2}
    assert largest == {64 if halved else 127}
    found = "onnxruntime.quantization, static" + ", weights in 7 bits" * halved
    assert report.quantization == found
    assert f"in int8 ({found})" in (folder / "README.md").read_text()
    assert ExportReport.read(folder) == report


@pytest.mark.parametrize(("precision", "halved"), [("float32", True), ("float16", False), ("int8", 3)])
def test_a_range_is_refused(model: Any, tmp_path: Path, precision: Any, halved: Any) -> None:
    with pytest.raises(lp.ArgumentError, match="reduce_range"):
        lp.export(model, tmp_path / "out", IMAGES, precision=precision, reduce_range=halved)
    assert not (tmp_path / "out").exists()


class Layers(nn.Module):
    """Two products; images are of 32 x 32 and have three channels."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(64, 8)).to(dtype).eval()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.layers(images.to(self.dtype))
        return made.float()


def loaded(format: ExportFormat, layers: nn.Module, folder: Path) -> tuple[Tensor, RuntimeGraph]:
    format.write(format.convert(graph_of(layers, IMAGES), None, False), folder)
    (found,) = format.load(folder, tuple(IMAGES.shape))(IMAGES)
    graph = format.in_runtime(folder, tuple(IMAGES.shape))
    assert graph is not None
    with torch.no_grad():
        torch.testing.assert_close(found, layers(IMAGES), rtol=0.05, atol=0.05)
    return found, graph


def test_dynamic_ranges(tmp_path: Path) -> None:
    format = parse_format("onnx", precision="int8-dynamic")
    _, graph = loaded(format, Layers(torch.float32), tmp_path)
    assert {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"} & set(graph.operators)


def test_bfloat16_in_openvino(tmp_path: Path) -> None:
    format = parse_format("openvino", precision="bfloat16")
    if format.runtime.context()["runtime_precision"] != "bf16":
        with pytest.raises(lp.ArgumentError, match=r"`precision` must be .* got 'bfloat16': it takes f32"):
            format.refuse(Layers(torch.float32))
        return
    format.refuse(Layers(torch.float32))
    _, graph = loaded(format, Layers(torch.bfloat16), tmp_path)
    assert graph.precisions is not None
    assert "bf16" in graph.precisions


def test_onnx_runtime_has_no_bfloat16_on_a_cpu(tmp_path: Path) -> None:
    format = parse_format("onnx", precision="bfloat16")
    with pytest.raises(
        lp.ExportError, match=r"`precision` must be .* 'onnxruntime', which lacks operators in bfloat16"
    ):
        loaded(format, Layers(torch.bfloat16), tmp_path)


def test_too_few_images_of_the_same_class_are_refused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = TorchExportFormat.load
    monkeypatch.setattr(TorchExportFormat, "load", lambda *args: lambda images: [-load(*args)(images)[0]])
    options: dict[str, Any] = {"format": "torch-export", "precision": "bfloat16", "rounds": 0}
    message = r"gives 0\.00% of 2 images the same class; at least 50\.0% must be \(`min_agreement`\)"
    with pytest.raises(lp.ExportError, match=message):
        lp.export(model, tmp_path / "out", IMAGES, min_agreement=0.5, **options)
    assert list(tmp_path.iterdir()) == []
    report = lp.export(model, tmp_path / "out", IMAGES, min_agreement=0, **options)
    assert (report.parity.top1_agreement, report.parity.min_agreement) == (0, 0)


def test_a_device_without_bfloat16_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    format = parse_format("openvino", precision="bfloat16")
    monkeypatch.setattr(type(format.runtime), "context", lambda _: {"runtime_precision": "f32"})
    with pytest.raises(lp.ArgumentError, match=r"`precision` must be .* got 'bfloat16': it takes f32"):
        format.refuse(model)


def test_a_model_that_is_quantized_already_is_not_written_as_a_float_one(model: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "torch-export", "rounds": 0}
    with (
        Int8Weights(model),
        pytest.raises(lp.ArgumentError, match=r"`model` must have plain weights.*precision='int8'"),
    ):
        lp.export(model, tmp_path / "out", IMAGES, **options)
    applied = parse_runtime("onnxruntime:quantize=dynamic").applied(find_vision_transformer(model))
    with applied, pytest.raises(lp.ArgumentError, match=r"in 'onnxruntime:quantize=dynamic'.*precision='int8'"):
        lp.export(model, tmp_path / "out", IMAGES, **options)
    assert list(tmp_path.iterdir()) == []
