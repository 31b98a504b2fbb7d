import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.quantization import Int8Weights, availability, unsupported_reason


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


def test_a_missing_device_has_a_reason() -> None:
    for device in (torch.device("xpu", 0), "meta"):
        reason = unsupported_reason(device)
        assert reason is not None
        assert reason.startswith(f"int8 failed in a trial on {device}: ")
        assert "\n" not in reason


def test_a_model_without_quantizable_layers_has_a_reason() -> None:
    assert unsupported_reason("cpu", nn.Linear(3, 5)) == (
        "Linear has no linear layer that can be quantized: Linear: 3 -> 5: sizes must be multiples of 8"
    )


@pytest.mark.parametrize(("factor", "error"), [(2.0, r"(9\d|10\d)%"), (float("nan"), "nan%")])
@pytest.mark.parametrize("rows", [1, 32])
def test_inaccurate_results_are_a_reason(monkeypatch: pytest.MonkeyPatch, factor: float, error: str, rows: int) -> None:
    """With results as of saturated sums, in the kernel for few rows or in that for many."""

    class Off(Int8Weights):
        def __enter__(self) -> Int8Weights:
            def change(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
                return out * factor if len(inputs[0]) == rows else out

            self.hook = self._layers[0].register_forward_hook(change)
            return super().__enter__()

        def __exit__(self, *args: Any) -> None:
            self.hook.remove()
            super().__exit__(*args)

    monkeypatch.setattr(availability, "Int8Weights", Off)
    reason = unsupported_reason("cpu")
    assert reason is not None
    assert re.fullmatch(f"int8 is inaccurate on cpu: a layer 64 -> 64 has an error of {error}", reason)


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


def test_a_missing_extra_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    found = unsupported_reason("cpu", model())
    assert found is not None
    assert found.startswith("torchao cannot be used (")
    assert found.endswith("; pip install 'lightning-prune[int8]'")
