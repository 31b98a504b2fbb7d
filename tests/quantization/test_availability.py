import builtins
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.fresh import run_fresh
from lightning_prune.errors import ArgumentError
from lightning_prune.quantization import Int8Weights, availability, backend, int8_backend, onednn, unsupported_reason


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 10)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_supported(dtype: torch.dtype) -> None:
    network = model().to(dtype)
    parameters, numbers = list(network.parameters()), torch.random.get_rng_state()
    assert unsupported_reason("cpu") is None
    assert unsupported_reason(torch.device("cpu"), network, torch.ones(4, 16, dtype=dtype)) is None
    assert all(one is other for one, other in zip(parameters, network.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), numbers)


@pytest.mark.parametrize("kind", ["mps", "meta"])
def test_unsupported_devices_have_a_reason(kind: str) -> None:
    assert unsupported_reason(kind, model()) == f"no int8 matrix product on {kind}"


def test_a_missing_device_has_a_reason() -> None:
    reason = unsupported_reason(torch.device("xpu", 0))
    assert reason is not None
    assert reason.startswith("int8 failed in a trial on xpu:0: ")
    assert "\n" not in reason


def test_a_model_without_quantizable_layers_has_a_reason() -> None:
    assert unsupported_reason("cpu", nn.Linear(3, 5)) == (
        "Linear has no linear layer that can be quantized: Linear: 3 -> 5: sizes must be multiples of 8"
    )


def test_inaccurate_results_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the results of saturated sums, as on a CPU without VNNI."""

    class Off(Int8Weights):
        def __enter__(self) -> Int8Weights:
            super().__enter__()
            self._layers[0].module._parameters["weight"] = nn.Parameter(2 * self._layers[0].source)
            return self

    monkeypatch.setattr(availability, "Int8Weights", Off)
    assert unsupported_reason("cpu") == "int8 is inaccurate on cpu: a layer 64 -> 64 has an error of 100%"


class OtherUse(nn.Module):
    """Uses the weight of its layer in a way that int8 does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.roll(1, 0)


def test_a_failing_run_of_the_model_is_the_reason() -> None:
    network = OtherUse()
    weight = network.layer.weight
    assert unsupported_reason("cpu", network) is None
    reason = unsupported_reason("cpu", network, torch.zeros(2, 16))
    assert reason is not None
    assert reason.startswith("int8 failed in a trial on cpu: ")
    assert network.layer.weight is weight


def without_torchao(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "torchao":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "lightning_prune.quantization.int8_tensor", raising=False)
    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'torchao'", name="torchao"), "torchao is not installed"),
        (ImportError("cannot import name 'Int8Tensor'"), r"torchao cannot be used \(cannot import name 'Int8Tensor'\)"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    without_torchao(monkeypatch, error)
    assert unsupported_reason("cpu", model()) is None or onednn.weight_limit() is None
    monkeypatch.setattr(onednn, "weight_limit", lambda: None)
    assert int8_backend("cpu") == "torchao"
    with pytest.raises(ArgumentError, match=rf"^int8: {reason}; pip install 'lightning-prune\[int8\]'$"):
        Int8Weights(model())
    found = unsupported_reason("cpu", model())
    assert found is not None
    assert found.endswith("; pip install 'lightning-prune[int8]'")


def test_only_known_messages_are_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    for name in backend._KNOWN:  # a command may have set the level of one
        caplog.set_level(logging.WARNING, logger=name)
    with caplog.at_level(logging.WARNING), backend.quiet():
        for name, known in backend._KNOWN.items():
            logging.getLogger(name).warning("before %s after", known)
            logging.getLogger(name).warning("news")
    assert [record.getMessage() for record in caplog.records] == ["news"] * len(backend._KNOWN)
    logging.getLogger("torchao").warning(backend._KNOWN["torchao"])
    assert len(caplog.records) == len(backend._KNOWN) + 1


def test_int8_is_registered_on_first_use() -> None:
    """Importing the comparison registers neither the operator nor the tensor class."""
    code = """
import io, torch
import lightning_prune.profiling, lightning_prune.planning, lightning_prune.classification, lightning_prune.callbacks
import lightning_prune.comparison.api
from lightning_prune.quantization import Int8Weights, allow_checkpoints, int8_backend
known = lambda: [c.__name__ for c in torch.serialization.get_safe_globals() if "Int8" in getattr(c, "__name__", "")]
assert not known()
assert not hasattr(torch.ops.lightning_prune, "int8_product")
model = torch.nn.Linear(16, 16)
Int8Weights(model).apply()
print(int8_backend("cpu"), known(), hasattr(torch.ops.lightning_prune, "int8_product"))
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    expected = "oneDNN ['CPUInt8Weight'] True" if onednn.weight_limit() else "torchao [] True"
    assert done.stdout.strip() == expected


def test_a_checkpoint_is_read_in_another_process(tmp_path: Path) -> None:
    model = nn.Linear(16, 16)
    with Int8Weights(model):
        torch.save(model.state_dict(), tmp_path / "int8.pt")
    code = """
import sys, torch
from lightning_prune.quantization import allow_checkpoints
try:
    torch.load(sys.argv[1], weights_only=True)
except Exception as error:
    print(type(error).__name__)
allow_checkpoints()
print(type(torch.load(sys.argv[1], weights_only=True)["weight"]).__name__)
"""
    done = run_fresh(code, str(tmp_path / "int8.pt"))
    if onednn.weight_limit():
        assert done.stdout.split() == ["UnpicklingError", "CPUInt8Weight"], done.stderr
