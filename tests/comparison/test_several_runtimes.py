"""Several runtimes in one comparison: each with dense, latencies and validations of its own, and nothing mixed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_prune as lp
from helpers.clock import TickingClock
from helpers.models import DEPTH, digits_module
from lightning_prune.comparison.final_run import EAGER, FinalTimer
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling import InterleavedTimer, Variant
from lightning_prune.runtimes import TorchEager, is_compiled, parse_runtime
from lightning_prune.runtimes.base import runtime_of
from lightning_prune.runtimes.calibration import CALIBRATION_IMAGES, calibration_batches
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.switch import RuntimeSwitch

BLOCKS = "torch.compile:mode=blocks"


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled is what was traced: inductor would take minutes."""
    torch.compiler.reset()

    def trace(self: nn.Module, mode: str | None = None, **options: Any) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", trace)


@pytest.fixture
def running_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Timed runs, which are not made: the runtime, and what was asked for. A compiled one takes half of the time."""
    seen: list[tuple[str, Any]] = []

    def once(self: InterleavedTimer[Any], alternative: Any) -> float:
        self.prepare(alternative)
        compiled = [model for model in ROOTS if is_compiled(model)]
        runtime = runtime_of(compiled[0]).name if compiled else "torch"
        seen.append((runtime, alternative))
        if isinstance(alternative, int):
            tokens = alternative * DEPTH
        else:
            schedule = alternative.schedule if isinstance(alternative, Variant) else None
            tokens = sum(schedule.tokens(197)) if schedule is not None else 197 * DEPTH
        return 1e-3 * tokens * (0.5 if compiled else 1.0)

    monkeypatch.setattr(InterleavedTimer, "once", once)
    return seen


ROOTS: list[nn.Module] = []  # of the model that is timed


@pytest.fixture
def model() -> Any:
    module = digits_module()
    ROOTS[:] = [module.model]
    yield module
    ROOTS.clear()


@pytest.mark.long
def test_each_runtime_has_its_own_figures(model: Any, running: Any, tmp_path: Path, running_in: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validated: list[str] = []
    step = type(model).validation_step

    class Watched(lp.ImageClassifier):
        def validation_step(self, *args: Any) -> Any:
            runtime = runtime_of(self.model)
            validated.append("torch" if runtime is None else runtime.name)
            return step(self, *args)

    model.__class__ = Watched
    trainer, _ = running(method="pomt", time_limit=3)
    data, messages = lp.DigitsData(batch_size=8), []
    found = lp.compare(
        *(trainer, model, data, ["pomt", "random"], [1.25]),
        runtimes=["torch", BLOCKS],
        output=tmp_path,
        clock=TickingClock(),
        on_message=messages.append,
    )
    names = ["dense", "pomt 1.25x", "random 1.25x"]
    assert [row.variant for row in found.rows] == [f"{name} [{rt}]" for rt in ("torch", BLOCKS) for name in names]
    assert [row.runtime for row in found.rows] == ["torch"] * 3 + [BLOCKS] * 3
    assert [row.method for row in found.rows] == ["", "pomt", "random"] * 2
    for row in found.rows:
        eager = 197 * DEPTH / (row.latency_ms or 0.0)
        assert row.speedup_vs_eager == pytest.approx(eager)
        assert row.speedup == pytest.approx(eager / (1.0 if row.runtime == "torch" else 2.0))
        assert row.images == 16
    assert {row.speedup for row in found.rows if row.method == ""} == {1.0}
    # What is timed as a runtime runs in it.
    for runtime, alternative in running_in:
        if isinstance(alternative, Variant) and alternative.runtime is not None:
            assert alternative.runtime.name == runtime
    assert {runtime for runtime, alternative in running_in if isinstance(alternative, int)} == {"torch", BLOCKS}
    assert validated[0] == "torch"  # the first batch
    assert validated[1:] == ["torch"] * 6 + [BLOCKS] * 6
    assert found.plan.context["runtime"] == f"torch, {BLOCKS}"
    for row in found.rows[1:3] + found.rows[4:]:
        file = tmp_path / found.to_dict()["variants"][row.variant]["file"]
        assert lp.Schedule.load(file).total_removed == row.removed
    assert not is_compiled(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = lp.compare(
        *(trainer, model, data, ["pomt", "random"], [1.25]),
        runtimes=["torch", BLOCKS],
        output=tmp_path,
        on_message=messages.append,
    )
    assert "6 of 6 variants were finished before" in messages[-1]
    assert [row.to_dict() for row in again.rows] == [row.to_dict() for row in found.rows]


def test_one_compiled_runtime_is_compared_with_eager(
    model: Any, running: Any, running_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = running(method="pomt", schedule=60, time_limit=3)
    found = lp.compare(trainer, model, lp.DigitsData(batch_size=8), runtimes=[BLOCKS], clock=TickingClock())
    assert [row.variant for row in found.rows] == ["dense", "pomt given"]
    assert [row.runtime for row in found.rows] == [BLOCKS] * 2
    assert found.rows[0].speedup_vs_eager == pytest.approx(2.0)
    assert found.rows[1].speedup_vs_eager == pytest.approx(2.0 * (found.rows[1].speedup or 0.0))
    assert {runtime for runtime, alternative in running_in if alternative == EAGER} == {"torch"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_eager_is_float32_whatever_the_model_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = digits_module().model.to(dtype).eval()
    images = torch.rand(2, 1, 56, 56, dtype=dtype)
    seen: list[tuple[torch.dtype, bool]] = []
    head = type(model).forward_head

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        output = head(self, *args, **options)
        seen.append((output.dtype, is_compiled(self)))
        return output

    monkeypatch.setattr(type(model), "forward_head", watched)
    runtime, autocast = parse_runtime(BLOCKS), dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        final = FinalTimer(find_vision_transformer(model), images, [runtime], lambda: float(len(seen)))
        final.timer.measure([Variant(runtime=runtime)], 2)
        assert final.speedup_vs_eager(Variant(runtime=runtime)) == 1.0
        final.close()
    assert {kind for kind, compiled in seen if compiled} == {torch.bfloat16}
    assert {kind for kind, compiled in seen if not compiled} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not is_compiled(model)


def test_eager_is_no_further_run_where_a_variant_is_it() -> None:
    model = digits_module().model.eval()
    final = FinalTimer(find_vision_transformer(model), torch.rand(1, 1, 56, 56), [TorchEager()], lambda: 0.0)
    assert final.timer.references(Variant(runtime=TorchEager())) == [Variant(runtime=TorchEager())] * 2


@torch.no_grad()
def test_a_switch_keeps_what_was_compiled_and_leaves_nothing() -> None:
    model, images = digits_module().model.eval(), torch.rand(1, 1, 56, 56)
    before = [dict(vars(module)) for module in model.modules()]
    switch = RuntimeSwitch(find_vision_transformer(model))
    whole, blocks = parse_runtime("torch.compile"), parse_runtime(BLOCKS)
    expected = model(images)
    calls: dict[str, Any] = {}
    for runtime in (whole, TorchEager(), blocks, whole, blocks, TorchEager(), whole):
        switch.to(runtime)
        switch.to(runtime)
        assert runtime_of(model) == (None if runtime == TorchEager() else runtime)
        torch.testing.assert_close(model(images), expected)
        call = vars(model).get("_compiled_call_impl")
        assert (call is not None) == (runtime == whole)
        assert calls.setdefault(runtime.name, call) is call
    switch.off()
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_runtime_that_is_applied_is_not_exchanged() -> None:
    model = digits_module().model
    transformer = find_vision_transformer(model)
    with parse_runtime(BLOCKS).applied(transformer):
        RuntimeSwitch(transformer).to(parse_runtime(BLOCKS))
        with pytest.raises(lp.ArgumentError, match=r"`runtime` must be 'torch.compile:mode=blocks', .*got 'torch'"):
            RuntimeSwitch(transformer).to(TorchEager())


@pytest.mark.long
def test_8_bits_are_those_of_the_runtime_and_compared_with_its_dense_model(
    model: Any, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is converted or timed: what runs, what it is compared with, and on which images it is calibrated."""
    plain, int8 = parse_runtime("onnxruntime"), parse_runtime("onnxruntime:quantize=static")
    calibrated: list[int] = []

    def converted(self: ConvertedRuntime, graph: Any) -> Any:
        if self.name == int8.name:
            calibrated.append(sum(len(each) for each, *_ in calibration_batches(graph, self.name)))
        module = graph.program.module()
        return lambda *tensors: [module(*tensors)]

    def once(self: InterleavedTimer[Any], alternative: Any) -> float:
        self.prepare(alternative)
        if isinstance(alternative, int):
            return 1e-3 * alternative
        if alternative == EAGER:
            return 0.4
        removed = alternative.schedule.total_removed if alternative.schedule is not None else 0
        return (197 - removed) * (0.5e-3 if alternative.runtime == int8 else 1e-3)

    monkeypatch.setattr(type(plain), "load", converted)
    monkeypatch.setattr(InterleavedTimer, "once", once)
    monkeypatch.setattr(type(plain), "load_counts", lambda self, graph: lambda count: converted(self, graph))
    trainer, _ = running(method="pomt", time_limit=60)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is calibrated on")
        found = lp.compare(
            *(trainer, model, lp.DigitsData(batch_size=8), ["int8", "pomt+int8"], [1.5, 3.0]),
            runtimes=["onnxruntime"],
            clock=TickingClock(),
        )
    rows = {row.variant: row for row in found.rows}
    assert list(rows) == ["dense", "int8", "pomt+int8 1.5x", "pomt+int8 3x"]
    assert rows["int8"].speedup == pytest.approx(2.0)
    assert rows["int8"].speedup_vs_eager == pytest.approx(0.4 / (197 * 0.5e-3))
    assert rows["int8"].note == "8 bits by onnxruntime:quantize=static"
    assert rows["pomt+int8 1.5x"].removed == 0
    assert rows["pomt+int8 3x"].speedup >= 3.0
    assert "8 bits by onnxruntime:quantize=static" in rows["pomt+int8 3x"].note
    assert {row.runtime for row in found.rows} == {"onnxruntime"}
    assert set(calibrated) == {CALIBRATION_IMAGES}
    assert not is_compiled(model)
