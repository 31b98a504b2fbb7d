"""The kernel of the CPU, compared with sums in float64."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.quantization import Int8Weights, onednn
from lightning_prune.quantization.cpu_tensor import quantize

LIMIT = onednn.weight_limit() or 63


def by_hand(x: Tensor, ints: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The reference by loops; half a step is rounded up."""
    out = []
    for row in x.double().reshape(-1, x.shape[-1]).tolist():
        most = max(map(abs, row)) or 1.0
        steps = [int(127 * value / most + 128.5) - 128 for value in row]
        for channel, (weights, scale) in enumerate(zip(ints.tolist(), scales.double().tolist(), strict=True)):
            value = sum(a * b for a, b in zip(steps, weights, strict=True)) * most / 127 * scale
            out.append(value + (0.0 if bias is None else float(bias[channel])))
    return torch.tensor(out, dtype=torch.float64).view(*x.shape[:-1], len(ints))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 3, 24), (2, 2, 3, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_integer_sums(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, offset = torch.randn(shape), torch.randn(16) if bias else None
    ints, scales = onednn.quantize_rows(torch.randn(16, 24), LIMIT)
    found = onednn.int8_linear(x, ints, scales, offset)
    assert found.shape == (*shape[:-1], 16)
    assert torch.allclose(found.double(), by_hand(x, ints, scales, offset), atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(sign: int) -> None:
    """With the largest products, which saturate on a CPU without VNNI."""
    ints = torch.full((32, 768), -LIMIT - 1, dtype=torch.int8)
    found = onednn.int8_linear(torch.full((40, 768), 127.0 * sign), ints, torch.ones(32), None)
    assert torch.equal(found, torch.full((40, 32), float(sign * 127 * (-LIMIT - 1) * 768)))


def test_tokens_are_independent() -> None:
    torch.manual_seed(0)
    ints, scales = onednn.quantize_rows(torch.randn(16, 24), LIMIT)
    x = torch.randn(6, 24) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1e6, 0.0])[:, None]
    together = onednn.int8_linear(x, ints, scales, None)
    assert torch.equal(together, torch.cat([onednn.int8_linear(row, ints, scales, None) for row in x.split(1)]))
    assert not together[5].any()


def test_strides_and_nan() -> None:
    torch.manual_seed(0)
    ints, scales = onednn.quantize_rows(torch.randn(16, 24), LIMIT)
    x = torch.randn(24, 5).T
    assert torch.equal(onednn.int8_linear(x, ints, scales, None), onednn.int8_linear(x.clone(), ints, scales, None))
    x[2, 3] = float("nan")
    lost = onednn.int8_linear(x, ints, scales, None).isnan()
    assert lost[2].all()
    assert lost.sum() == 16


def test_inputs_of_another_width_are_rejected() -> None:
    ints, scales = onednn.quantize_rows(torch.randn(16, 24), LIMIT)
    for width in (23, 25, 48):
        with pytest.raises(RuntimeError):
            onednn.int8_linear(torch.randn(4, width), ints, scales, None)


def test_packed_weights_are_freed_with_the_weights() -> None:
    gc.collect()
    before = len(onednn._packed)
    layer = nn.Linear(16, 16)
    with torch.no_grad(), Int8Weights(layer) as int8:
        layer(torch.randn(2, 16))
        layer(torch.randn(2, 16))
    assert len(onednn._packed) == before + 1
    del layer, int8
    gc.collect()
    assert len(onednn._packed) == before


def test_other_uses_are_rejected() -> None:
    weight = quantize(torch.randn(16, 16), LIMIT)
    with pytest.raises(UnsupportedModelError, match=r"^int8: weights quantized for the CPU are on meta; remove"):
        F.linear(torch.randn(2, 16), weight.to("meta"))
    with pytest.raises(UnsupportedModelError, match=r"^int8: F.linear got an int8 weight as its input or bias"):
        F.linear(weight, torch.randn(16, 16))
    with pytest.raises(TypeError):
        weight + 1


def test_nothing_warns(recwarn: pytest.WarningsRecorder) -> None:
    layer = nn.Linear(16, 16)
    with Int8Weights(layer):
        layer(torch.randn(2, 16))
    assert not recwarn.list
