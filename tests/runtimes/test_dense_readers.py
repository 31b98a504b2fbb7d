"""Dense models in runtimes that convert them: the module that reads the tokens is what runs."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_prune as lp
from helpers.data import noise_images
from helpers.dense import FeatureNet, HeadOnHook, dense_net
from helpers.models import tiny_vit
from lightning_prune.patching import PatchHandle, find_vision_transformer
from lightning_prune.patching.token_readers import RestoreMode
from lightning_prune.profiling import profile_latency
from lightning_prune.runtimes import is_compiled, parse_runtime
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.token_curve import TokenCurve, _GivenTokens, _kept

IMAGES = noise_images(6)
SPECS = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.long)]


def leaves(found: Any) -> list[Tensor]:
    return list(found.values()) if isinstance(found, dict) else [found]


def converting(spec: str) -> ConvertedRuntime:
    runtime = parse_runtime(spec)
    assert isinstance(runtime, ConvertedRuntime)
    return runtime


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", ["auto", pytest.param("copy", marks=pytest.mark.long)])
def test_one_graph_serves_all_token_counts(spec: str, mode: Any) -> None:
    net = FeatureNet(tiny_vit(noise=0.1)).eval()
    transformer = find_vision_transformer(net, restore=mode)
    curve = TokenCurve(converting(spec), transformer, IMAGES)
    for count in (17, 16, 9, 3):
        curve.to(count)
        with PatchHandle(replace(transformer, restore="copy"), _GivenTokens(), lp.Schedule([17 - count, 0, 0, 0])):
            before = _kept.set(torch.arange(count))
            expected = net(IMAGES)
            _kept.reset(before)
        for one, other in zip(curve.run(), leaves(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("method", "mode", "build"),
    [
        ("tome", "auto", HeadOnHook),
        pytest.param("topk", "auto", HeadOnHook, marks=pytest.mark.long),
        pytest.param("topk", "copy", dense_net, marks=pytest.mark.long),
    ],
)
def test_the_reader_is_what_runs(spec: str, method: str, mode: Any, build: Any) -> None:
    net = build().eval()
    expected = {}
    for name, schedule in (("dense", [0] * 4), ("pruned", [5, 0, 4, 0])):
        with lp.patch(net, method, schedule, restore=mode):
            expected[name] = net(IMAGES)
    transformer = find_vision_transformer(net, restore=mode)
    assert transformer.outer is net
    with parse_runtime(spec).applied(transformer):
        for name, schedule in (("dense", [0] * 4), ("pruned", [5, 0, 4, 0]), ("dense", [0] * 4)):
            with lp.patch(net, method, schedule, restore=mode):
                torch.testing.assert_close(net(IMAGES), expected[name], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected["dense"], expected["pruned"], rtol=1e-3, atol=1e-4)
    assert torch.equal(net(IMAGES), expected["dense"])


@pytest.mark.long
@torch.no_grad()
def test_modes_have_graphs_of_their_own() -> None:
    net = dense_net()
    transformer = find_vision_transformer(net, restore="auto")
    with parse_runtime("onnxruntime").applied(transformer):
        found = {}
        modes: list[RestoreMode] = ["copy", "delta"]
        for mode in modes:
            with lp.patch(net, "topk", [8, 0, 0, 0], restore=mode):
                found[mode] = net(IMAGES)
    assert not torch.allclose(found["copy"], found["delta"], rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("spec", "build"), [("torch", HeadOnHook), ("onnxruntime", HeadOnHook), ("torch.compile", dense_net)]
)
def test_a_plan(spec: str, build: Any) -> None:
    net = build().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    options: dict[str, Any] = {"calibration": IMAGES, "verbose": False, "use_cache": False, "time_limit": 4}
    made = lp.plan(
        net, IMAGES[:2], methods="topk", objective=lp.AccuracyBudget(0.5), restore="auto", runtime=spec, **options
    )
    assert made.profile.context["restore"] == "auto"
    assert made.profile.context["runtime"] == spec
    with torch.no_grad():
        dense = net(IMAGES)
        with lp.patch(net, made, restore="auto"):
            assert net(IMAGES).shape == dense.shape
        assert torch.equal(net(IMAGES), dense)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not is_compiled(net)


@pytest.mark.long
@torch.no_grad()
def test_graphs_depend_on_hooks_and_a_warning_says_when_these_are_called() -> None:
    net = HeadOnHook().eval()
    expected = net(IMAGES)
    in_runtime = parse_runtime("onnxruntime").applied(find_vision_transformer(net, restore="auto"))
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match="for its own forward"):
            stack.enter_context(in_runtime)
        torch.testing.assert_close(net(IMAGES), expected, rtol=1e-3, atol=1e-4)
        hook = net.vit.blocks[1].register_forward_pre_hook(lambda _, args: (2 * args[0],))
        found = net(IMAGES)
        hook.remove()
    assert not torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_hooks_that_read_are_called_while_measured(recwarn: pytest.WarningsRecorder) -> None:
    net = HeadOnHook().eval()
    calls: list[int] = []
    net.vit.blocks[3].register_forward_hook(lambda *_: calls.append(1))
    transformer = find_vision_transformer(net, restore="auto")
    assert transformer.count_tokens(IMAGES) == 17
    lp.plan(net, IMAGES[:1], calibration=IMAGES, methods="topk", restore="auto", verbose=False, time_limit=1)
    assert not [each for each in recwarn if "hooks" in str(each.message)]
    assert calls
    calls.clear()
    profile_latency(net.vit, IMAGES[:1], time_limit=1, verbose=False)  # without `restore` they read nothing that runs
    assert not calls
