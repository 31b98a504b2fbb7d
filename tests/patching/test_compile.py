from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_prune as lp
from lightning_prune.reduction import RandomDrop, Reduction, portable_graph

REMOVED = [0, 6, 5, 0]
CASES: list[tuple[str, str | Reduction, list[int]]] = [
    *(
        (name, "pomt", REMOVED)
        for name in ("vit", "dinov2-registers", "siglip", "distilled", "diff-attention", "res-post")
    ),
    ("parallel-things", "pomt", REMOVED),
    ("vit", "random", REMOVED),
    ("registers-without-class", RandomDrop(1, "input"), [9, 0, 0, 0]),
]
every_case = pytest.mark.parametrize(("name", "method", "removed"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@torch.no_grad()
def run(model: Any, images: Tensor) -> Tensor:
    output: Tensor = model(images)
    return output


def compiled(model: nn.Module, backend: str = "eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.long
@every_case
def test_one_graph_once(build: Any, draw: Any, name: str, method: str | Reduction, removed: list[int]) -> None:
    model = build(name)
    lp.patch(model, method, removed)
    fast, counter = compiled(model)
    for seed in range(3):
        images = draw(seed=seed)
        torch.testing.assert_close(run(fast, images), run(model, images), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["parallel-scaling", "dynamic-size", "qk-norm"])
def test_one_graph_with_blocks_that_cannot_be_split(build: Any, images: Tensor, name: str) -> None:
    model = build(name)
    lp.patch(model, "pomt", [0, 6, 5, 0])
    fast, counter = compiled(model, "aot_eager")
    for _ in range(2):
        torch.testing.assert_close(run(fast, images), run(model, images), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.long
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapper", "in-place"])
def test_a_model_that_was_compiled_and_ran_before(build: Any, images: Tensor, wrapped: bool) -> None:
    """Dense, patched, patched with another schedule, updated, dense: the matching graph runs each time."""
    model, other = build(), build()
    counter = CompileCounterWithBackend("eager")
    if wrapped:
        fast = torch.compile(model, backend=counter, fullgraph=True)
    else:
        fast = model
        model.compile(backend=counter, fullgraph=True)

    def same() -> None:
        for _ in range(2):
            torch.testing.assert_close(run(fast, images), run(other, images), rtol=1e-5, atol=1e-5)

    same()
    first = lp.patch(fast, "pomt", [0, 6, 0, 0])
    reference = lp.patch(other, "pomt", [0, 6, 0, 0])
    same()
    lp.patch(fast, "random", [0, 0, 9, 0])
    lp.patch(other, "random", [0, 0, 9, 0])
    same()
    second = lp.patch(fast, "pomt", [0, 6, 0, 0])
    reference = lp.patch(other, "pomt", [0, 6, 0, 0])
    second.update([0, 12, 0, 0])
    reference.update([0, 12, 0, 0])
    same()
    first.remove()
    same()
    second.remove()
    reference.remove()
    same()
    assert counter.frame_count <= 5


def test_a_compiled_block_stays_compiled_and_is_split(
    build: Any, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = build(), build()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    with caplog.at_level("INFO", "lightning_prune"):
        handle = lp.patch(model, "pomt", [0, 6, 5, 0])
    assert caplog.messages == []
    with lp.patch(other, "pomt", [0, 6, 5, 0]):
        torch.testing.assert_close(run(model, images), run(other, images), rtol=1e-5, atol=1e-5)
    handle.remove()
    torch.testing.assert_close(run(model, images), run(other, images), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_inductor(build: Any, images: Tensor) -> None:
    model = build(depth=1)
    lp.patch(model, "pomt", [6])
    fast = torch.compile(model, fullgraph=True)
    # Compiles no programs to try the instructions. Not by monkeypatch, whose end would hide the setting for good.
    with torch._inductor.config.patch("cpp.vec_isa_ok", True):
        torch.testing.assert_close(run(fast, images), run(model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_gradients_through_the_compiled_model(build: Any, images: Tensor) -> None:
    model = build()
    lp.patch(model, "pomt", [0, 6, 5, 0])
    fast, _ = compiled(model, "aot_eager")
    gradients = []
    for run_it in (model, fast):
        model.zero_grad()
        run_it(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)


@every_case
def test_export(build: Any, images: Tensor, name: str, method: str | Reduction, removed: list[int]) -> None:
    model = build(name)
    handle = lp.patch(model, method, removed)
    before = run(model, images)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
    assert set(program.state_dict) == set(model.state_dict())
    torch.testing.assert_close(run(program.module(), images), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(model, images), before)
    handle.remove()
    assert not torch.equal(run(model, images), before)
    torch.testing.assert_close(run(program.module(), images), before, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*TracerWarning", "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
@pytest.mark.parametrize("method", ["pomt", "pomt-nearest", "tome", "topk"])
def test_torch_jit_trace(build: Any, images: Tensor, method: str) -> None:
    model = build()
    with lp.patch(model, method, [0, 3, 0, 2]), torch.no_grad():
        expected = model(images)
        assert torch.equal(torch.jit.trace(model, images)(images), expected)


@pytest.mark.long
@pytest.mark.parametrize("form", [nullcontext, portable_graph], ids=["native", "portable"])
@pytest.mark.parametrize("method", ["pomt", "pomt-nearest", "random", "tome"])
def test_export_for_any_batch(build: Any, draw: Any, method: str, form: Any) -> None:
    model = build()
    lp.patch(model, method, [0, 6, 5, 0])
    with torch.no_grad(), form():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (draw(3),), dynamic_shapes=({0: batch},))
    for size in (1, 3, 5):
        torch.testing.assert_close(run(program.module(), draw(size)), run(model, draw(size)), rtol=1e-5, atol=1e-5)
