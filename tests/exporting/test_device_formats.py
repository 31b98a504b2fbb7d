"""The formats that compile for long or need a package that no extra installs, as far as they go without either.

`test_export.py` runs them for real, with `-m slow`.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.exporting import aotinductor_format
from lightning_prune.exporting.instructions import figures
from lightning_prune.exporting.runtime_graph import Fusion, graph_in_executorch
from lightning_prune.runtimes.aotinductor_runtime import CompiledPackage

IMAGES = noise_images(2)


def test_aotinductor_around_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs: dict[bytes, Any] = {}

    def compile_package(graph: Any) -> CompiledPackage:
        content = b"package %d" % len(programs)
        programs[content] = graph.program.module()
        return CompiledPackage(content, {"cpp_fused_gelu_view_6": 2}, {"addmm_out": 5})

    monkeypatch.setattr(aotinductor_format, "compile_package", compile_package)
    monkeypatch.setattr(
        aotinductor_format, "load_package", lambda path: lambda *tensors: [programs[path.read_bytes()](*tensors)]
    )
    model, plan = tiny_vit(depth=2, noise=0.3), lp.Schedule([4, 0], "tome")
    report = lp.export(model, tmp_path / "out", IMAGES, plan=plan, format="aotinductor", rounds=0)
    assert (report.model.name, report.model.read_bytes()) == ("model.pt2", b"package 0")
    assert report.operators["aten.linear.default"] > 0
    assert report.in_runtime is not None
    assert report.in_runtime.elsewhere == {"addmm_out": 5}
    assert report.in_runtime.gelu == Fusion(2, 0)
    assert any("processors like the one where it was exported" in each for each in figures(report))
    assert "aoti_load_package" in (tmp_path / "out" / "run.py").read_text()
    with torch.no_grad(), lp.patch(model, plan):
        torch.testing.assert_close(lp.load_exported(tmp_path / "out")(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
    with pytest.raises(lp.ArgumentError, match=r"`precision` must be .* with format='aotinductor', got 'int8'"):
        lp.export(model, tmp_path / "other", IMAGES, format="aotinductor", precision="int8")


def test_executorch_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "executorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.delitem(sys.modules, "lightning_prune.runtimes.executorch_runtime", raising=False)
    with pytest.raises(lp.RuntimeUnavailableError, match="pip install executorch"):
        lp.export(tiny_vit(depth=1), tmp_path / "out", IMAGES, format="executorch")
    assert list(tmp_path.iterdir()) == []


def test_what_xnnpack_does_not_run_is_counted() -> None:
    delegated = {"aten_linear_default": 8, "aten_gelu_default": 2}
    others = {"aten_native_layer_norm_default": 5, "aten_topk_default": 2, "aten_gelu_default": 1}
    graph = graph_in_executorch(delegated, others)
    assert graph.operators == {
        "aten_linear_default": 8,
        "aten_native_layer_norm_default": 5,
        "aten_gelu_default": 3,
        "aten_topk_default": 2,
    }
    assert graph.elsewhere == others
    assert (graph.gelu, graph.layer_norm, graph.attention) == (Fusion(3, None), Fusion(5, None), Fusion(0, 0))


@pytest.mark.slow
def test_executorch_says_what_xnnpack_does_not_run(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    model = tiny_vit(depth=2, noise=0.3)
    report = lp.export(model, tmp_path / "out", IMAGES, plan=lp.Schedule([4, 0], "topk"), format="executorch", rounds=2)
    assert report.in_runtime is not None
    assert report.in_runtime.elsewhere
    assert sum(report.in_runtime.elsewhere.values()) < sum(report.operators.values())
    assert report.latency is not None
    assert any("ExecuTorch's own kernels instead of XNNPACK" in each for each in figures(report))
    with pytest.raises(lp.ArgumentError, match="`batch` must be 'static' with format='executorch', got 'dynamic'"):
        lp.export(model, tmp_path / "other", IMAGES, format="executorch", batch="dynamic", rounds=0)
