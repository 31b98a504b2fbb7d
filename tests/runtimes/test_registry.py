"""Runtimes by spec, and what each makes of a model."""

import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import nn

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.runtimes import TorchCompile, TorchEager, applied_runtime, is_compiled, parse_runtime, registry
from lightning_prune.runtimes.registry import ENTRY_POINTS, EXTRAS, PACKAGES, RUNTIMES

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "blocks")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiled is whatever was traced: inductor would need a C++ compiler, and minutes."""
    torch.compiler.reset()

    def compile_eagerly(self: nn.Module, mode: str | None = None, **kwargs: Any) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    yield
    torch.compiler.reset()


class TestSpecs:
    @pytest.mark.parametrize("mode", MODES)
    def test_torch_compile(self, mode: Any) -> None:
        runtime = parse_runtime(f"torch.compile:mode={mode}")
        assert isinstance(runtime, TorchCompile)
        assert (runtime.mode, runtime.compiles) == (mode, True)
        assert runtime == TorchCompile(mode) == parse_runtime(runtime) == parse_runtime(runtime.name)
        assert runtime != TorchEager()
        assert runtime.context() == {
            "runtime": runtime.name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def test_names(self) -> None:
        assert parse_runtime("torch") == TorchEager()
        assert not parse_runtime("torch").compiles
        assert parse_runtime("torch").context()["runtime"] == "torch"
        installed = [name for name in RUNTIMES if name not in PACKAGES]
        assert [parse_runtime(name).name for name in installed] == installed
        assert parse_runtime("torch.compile:mode=default").name == "torch.compile"
        assert len({TorchEager(), TorchEager(), TorchCompile(), TorchCompile("blocks")}) == 3

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("troch", r"`runtime` must be one of 'torch', 'torch.compile', .* got 'troch'\. Did you mean 'torch'\?"),
            ("", "`runtime` must be "),
            (True, "`runtime` must be .* got True"),
            (None, "`runtime` must be .* got None"),
            ("torch:mode=blocks", "`runtime` must have settings that 'torch' takes, got 'torch:mode=blocks'"),
            ("torch.compile:speed=2", "`runtime` must have settings that 'torch.compile' takes"),
            ("torch.compile:blocks", "`runtime` must be a name or `name:key=value,...`, got 'torch.compile:blocks'"),
            ("onnxruntime:provider=QNN", r"`provider` must be one of .*CPUExecutionProvider.*, got 'QNN'"),
            ("onnxruntime:threads=0", "`threads` must be an integer >= 1, got"),
            ("openvino:precision=int8", "`precision` must be .*'bf16'.*, got 'int8'"),
            ("openvino:device=TPU", "`device` must be one of .*CPU.*, got 'TPU'"),
            ("torch.compile:mode=fast", "`mode` must be one of default, .*, blocks, got 'fast'"),
        ],
    )
    def test_bad_specs(self, spec: Any, message: str) -> None:
        with pytest.raises(lp.ArgumentError, match=message):
            parse_runtime(spec)

    def test_a_package_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(RUNTIMES, "elsewhere", "a_package_of_elsewhere:Elsewhere")
        monkeypatch.setitem(EXTRAS, "elsewhere", "away")
        message = r"The runtime 'elsewhere' needs a package .*of_elsewhere.*pip install 'lightning-prune\[away\]'"
        with pytest.raises(lp.RuntimeUnavailableError, match=message):
            parse_runtime("elsewhere")
        assert issubclass(lp.RuntimeUnavailableError, ImportError)


class TestPrepare:
    def test_eager(self) -> None:
        model = tiny_vit()
        run = TorchEager().prepare(model, IMAGES)
        with torch.no_grad():
            assert torch.equal(run(IMAGES), model(IMAGES))
        assert not run(IMAGES).requires_grad

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead", "blocks"])
    @pytest.mark.usefixtures("traced")
    def test_compiled(self, mode: Any) -> None:
        """On a copy that shares parameters: the model itself stays eager, patched or not."""
        model = tiny_vit()
        for schedule in (None, [0, 5, 0, 0]):
            if schedule is not None:
                lp.patch(model, "topk", schedule)
            run = TorchCompile(mode).prepare(model, IMAGES)
            with torch.no_grad():
                torch.testing.assert_close(run(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
                assert not is_compiled(model)
                next(model.head.parameters()).mul_(2)
                torch.testing.assert_close(run(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("traced")
    def test_what_is_compiled_already(self) -> None:
        model = tiny_vit()
        model.compile()
        assert TorchEager().unsupported_reason(model) is None
        assert "compiled already" in str(TorchCompile().unsupported_reason(model))
        with pytest.raises(lp.ArgumentError, match=r"`runtime` must be .* got 'torch.compile': .* compiled already"):
            TorchCompile().prepare(model, IMAGES)


class TestApplied:
    @pytest.mark.parametrize("mode", ["default", "reduce-overhead", "blocks"])
    @pytest.mark.usefixtures("traced")
    def test_in_place_until_it_ends(self, mode: Any) -> None:
        model = tiny_vit()
        transformer = find_vision_transformer(model)
        before = [dict(vars(module)) for module in model.modules()]
        runtime = TorchCompile(mode)
        with torch.no_grad():
            expected = model(IMAGES)
            with runtime.applied(transformer):
                assert is_compiled(model)
                assert applied_runtime(transformer) == runtime
                torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)
                with TorchCompile(mode).applied(transformer):
                    assert applied_runtime(transformer) == runtime
                assert is_compiled(model)
            assert torch.equal(model(IMAGES), expected)
        assert applied_runtime(transformer) is None
        assert [dict(vars(module)) for module in model.modules()] == before

    def test_eagerly(self) -> None:
        transformer = find_vision_transformer(tiny_vit())
        with TorchEager().applied(transformer), TorchEager().applied(transformer):
            assert not is_compiled(transformer.root)
            assert applied_runtime(transformer) is None

    @pytest.mark.usefixtures("traced")
    def test_one_at_a_time(self) -> None:
        transformer = find_vision_transformer(tiny_vit())
        with TorchCompile("blocks").applied(transformer):
            for other in (TorchEager(), TorchCompile()):
                with (
                    pytest.raises(lp.ArgumentError, match=r"must be 'torch\.compile:mode=blocks', which is applied"),
                    other.applied(transformer),
                ):
                    pass
            assert is_compiled(transformer.root)

    @pytest.mark.usefixtures("traced")
    def test_what_the_user_compiled(self) -> None:
        model = tiny_vit()
        model.compile()
        transformer = find_vision_transformer(model)
        with TorchEager().applied(transformer):
            assert applied_runtime(transformer) is None
        with pytest.raises(lp.ArgumentError, match="compiled already"), TorchCompile().applied(transformer):
            pass
        assert is_compiled(model)


class Halving(TorchEager):
    """A runtime of another package."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor
        self.name = "halving" if factor == 0.5 else f"halving:factor={factor}"


def test_another_package_adds_a_runtime_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    added = [EntryPoint("halving", f"{__name__}:Halving", ENTRY_POINTS), EntryPoint("torch", "no:Such", ENTRY_POINTS)]
    monkeypatch.setattr(registry, "entry_points", lambda group: added if group == ENTRY_POINTS else [])
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Halving.__module__])
    assert parse_runtime("halving:factor=2").name == "halving:factor=2"
    assert isinstance(parse_runtime("torch"), TorchEager)  # the names of this package are taken
    with pytest.raises(lp.ArgumentError, match=r"`runtime` must be one of .*'halving'.* Did you mean 'halving'\?"):
        parse_runtime("halvin")
