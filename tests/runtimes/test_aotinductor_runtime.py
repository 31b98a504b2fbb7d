"""AOTInductor as a runtime: what it says without compiling, and one model that is compiled (`-m slow`)."""

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.runtimes import aotinductor_runtime, parse_runtime
from lightning_prune.runtimes.graph_export import export_graph

IMAGES = noise_images(2)
SOURCES = {
    "wrapper.cpp": """
        extern "C" void cpp_fused_max_3(const float*);
        extern "C"  void  cpp_fused_gelu_view_6(const float*);
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(buf0));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(3));
        cpp_fused_gelu_view_6((const float*)(buf0));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_topk(buf1));
        cpp_fused_max_3((const float*)(buf1));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(buf2));
        cpp_fused_gelu_view_6((const float*)(buf2));
    """,
    "kernel.cpp": """extern "C"  void  cpp_fused_max_3(const float* in) {}""",
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Compiling writes two files, and what is loaded records its inputs and doubles the first."""
    seen: dict[str, Any] = {"inputs": []}

    def compile_and_package(program: Any, inductor_configs: Any) -> str:
        (tmp_path / "model.so").write_bytes(b"weights")
        with zipfile.ZipFile(tmp_path / "model.pt2", "w") as package:
            for name, content in SOURCES.items():
                package.writestr(f"model/data/{name}", content)
            package.writestr("model/data/model.so", b"compiled")
        return str(tmp_path / "model.pt2")

    def load_package(path: Path) -> Any:
        with zipfile.ZipFile(path) as package:
            seen["content"] = {name: package.read(name) for name in package.namelist()}

        def run(tensors: list[Tensor]) -> list[Tensor]:
            seen["inputs"].append(tensors)
            return [2 * tensors[0]]

        return SimpleNamespace(loader=SimpleNamespace(run=run))

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load_package)
    return seen


def test_what_it_says() -> None:
    runtime = parse_runtime("aotinductor")
    assert (runtime.name, runtime.compiles, runtime.converts) == ("aotinductor", True, True)
    assert runtime.context() == {
        "runtime": "aotinductor",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiler": aotinductor_runtime.cpp_compiler(),
    }
    with pytest.raises(lp.ArgumentError, match="`runtime` must have settings that 'aotinductor' takes"):
        parse_runtime("aotinductor:threads=1")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    aotinductor_runtime.cpp_compiler.cache_clear()
    with (
        torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler")),
        pytest.raises(lp.RuntimeUnavailableError, match=r"'aotinductor' needs a C\+\+ compiler.* CXX"),
    ):
        parse_runtime("aotinductor")


def test_each_graph_is_compiled_after_a_warning_and_leaves_no_file(compiled: dict[str, Any], tmp_path: Path) -> None:
    images = IMAGES.to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="every token count and every schedule .* minutes"):
        run = parse_runtime("aotinductor").prepare(nn.Identity(), images)
    assert compiled["content"] == {"model/data/model.so": b"compiled"}  # no source
    assert list(tmp_path.iterdir()) == []
    for given in (IMAGES, images):  # the compiled code relies on the strides that it was made for
        assert torch.equal(run(given), 2 * IMAGES)
        assert compiled["inputs"][-1][0].stride() == images.stride()


def test_kernels_are_counted_in_the_sources(compiled: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="minutes"):
        package = aotinductor_runtime.compile_package(export_graph(nn.Identity(), (IMAGES,)))
    assert package.compiled == {"cpp_fused_gelu_view_6": 2, "cpp_fused_max_3": 1}
    assert package.others == {"addmm_out": 2, "topk": 1}


def test_what_cannot_be_compiled(compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Any, inductor_configs: Any) -> str:
        raise NotImplementedError("no kernel for this\nand pages more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with (
        pytest.warns(UserWarning, match="minutes"),
        pytest.raises(lp.ExportError, match=r"cannot compile the graph: NotImplementedError: no kernel for this$"),
    ):
        parse_runtime("aotinductor").prepare(nn.Identity(), IMAGES)


def test_each_token_count_is_compiled_by_itself() -> None:
    runtime: Any = parse_runtime("aotinductor")
    with pytest.raises(lp.ExportError, match="aotinductor converts each token count by itself"):
        runtime.load_counts(export_graph(nn.Identity(), (IMAGES,)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:AOTInductor compiles")
def test_a_patched_model_is_the_same_model() -> None:
    model = tiny_vit(depth=2, embed_dim=24, noise=0.3)
    runtime = parse_runtime("aotinductor")
    with torch.no_grad(), lp.patch(model, lp.Schedule([4, 0], "tome")):
        expected = model(IMAGES)
        run = runtime.prepare(model, IMAGES)
        for _ in range(2):
            torch.testing.assert_close(run(IMAGES), expected, rtol=1e-4, atol=1e-4)
        with runtime.applied(find_vision_transformer(model)):
            torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(IMAGES), expected)
