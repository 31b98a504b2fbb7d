"""ExecuTorch as a runtime. No extra installs it: without it, an error says how (`-m slow` runs it where it is)."""

import sys
from typing import Any

import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.runtimes import parse_runtime

IMAGES = noise_images(1)
MODULE = "lightning_prune.runtimes.executorch_runtime"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "executorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(lp.RuntimeUnavailableError, match=r"'executorch' needs .* Install it: pip install executorch\."):
        parse_runtime("executorch")


@pytest.mark.slow
class TestInstalled:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("executorch")

    def test_what_it_says(self) -> None:
        runtime = parse_runtime("executorch")
        assert (runtime.name, runtime.compiles, runtime.converts) == ("executorch", True, True)
        assert runtime.context().keys() == {"runtime", "executorch", "torch", "provider", "threads"}
        reason = runtime.unsupported_reason(tiny_vit(depth=1).bfloat16())
        assert reason is not None
        assert "bfloat16" in reason

    @pytest.mark.parametrize("method", ["pomt", "pomt-nearest", "topk", "evit", "tome", "shift", "random", "vwt-intra"])
    def test_a_patched_model_is_the_same_model(self, method: Any) -> None:
        model = tiny_vit(depth=2, embed_dim=24, noise=0.3)
        with torch.no_grad(), lp.patch(model, method, [4, 0]):
            expected = model(IMAGES)
            run = parse_runtime("executorch").prepare(model, IMAGES)
            first = run(IMAGES)
            torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
            run(2 * IMAGES)
            torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)  # its memory is its own

    def test_another_number_of_threads_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = parse_runtime("executorch")
        runtime.prepare(torch.nn.Identity(), IMAGES)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        with pytest.raises(lp.ArgumentError, match=r"number of threads of PyTorch must be .* got 77"):
            runtime.prepare(torch.nn.Identity(), IMAGES)
