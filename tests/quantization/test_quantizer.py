"""Layers that torchao quantizes, compared with sums in float64 from the formula."""

import sys
from importlib.metadata import version

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torchao.utils import should_reduce_range

from lightning_prune.errors import ArgumentError
from lightning_prune.quantization.quantizer import quantize, quantizer_version

LIMIT = 63 if should_reduce_range(torch.device("cpu")) else 127
# Relative to the largest output: roundings of the dtype. In 16 bits torchao rounds the product, too.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.005}


def rows_of(*shape: int) -> Tensor:
    """Random rows whose largest magnitude is positive: a negative one is on the border of two steps."""
    rows = torch.randn(shape)
    rows[..., 0] = rows.abs().amax(-1) * 1.1
    return rows


def layer(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    """A layer in 8 bits, and the same in float."""
    torch.manual_seed(0)
    made, source = nn.Linear(24, 16).to(dtype), nn.Linear(24, 16).to(dtype)
    source.weight = nn.Parameter(rows_of(16, 24).to(dtype))
    made.weight, made.bias = quantize([source.weight])[0], source.bias
    return made, source


def steps(row: list[float]) -> tuple[list[int], float]:
    """A row in int8, symmetrically: the largest magnitude is the largest step, and zero stays zero."""
    step = max(map(abs, row)) / (LIMIT + 0.5) or 1.0
    return [max(-LIMIT - 1, min(LIMIT, round(value / step))) for value in row], step


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer by loops: each row of the weight and each token has a scale."""
    channels = [steps(row) for row in weight.double().tolist()]
    out = []
    for row in x.double().flatten(0, -2).tolist():
        values, step = steps(row)
        for (ints, scale), offset in zip(channels, bias.double().tolist(), strict=True):
            out.append(sum(a * b for a, b in zip(values, ints, strict=True)) * step * scale + offset)
    return torch.tensor(out, dtype=torch.float64).view(*x.shape[:-1], len(bias))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (2, 3, 24), (40, 24)])
def test_matches_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made, source = layer(dtype)
    x = rows_of(*shape).to(dtype)
    found = made(x)
    expected = by_hand(x, source.weight, source.bias)
    assert found.dtype == dtype
    most = expected.abs().max()
    assert (found.double() - expected).abs().max() < TOLERANCES[dtype] * most
    assert (expected - source(x)).abs().max() > 1e-3 * most  # it is no float product


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(sign: int) -> None:
    """All products have the same sign: 16-bit sums would saturate."""
    made = nn.Linear(768, 32, bias=False)
    nn.init.constant_(made.weight, -1.0)
    made.weight = quantize([made.weight])[0]
    for rows in (1, 40):
        found = made(torch.full((rows, 768), float(sign)))
        assert torch.allclose(found, torch.full((rows, 32), -768.0 * sign), rtol=1.5 / LIMIT)


def test_tokens_are_independent() -> None:
    """Of others with any magnitude, in one row and in many."""
    made, _ = layer()
    x = torch.randn(6, 24) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1e6, 0.0])[:, None]
    together = made(x)
    assert torch.equal(together, torch.cat([made(row) for row in x.split(1)]))
    assert torch.equal(together[5], made.bias)


def test_the_source_and_the_settings_of_inductor_are_unchanged() -> None:
    settings = config.save_config_portable()
    weight = nn.Parameter(torch.randn(8, 16))
    before, changes = weight.detach().clone(), weight._version
    (made,) = quantize([weight])
    assert torch.equal(weight, before)
    assert (weight.requires_grad, weight._version) == (True, changes)
    assert (made.shape, made.dtype, made.device, made.requires_grad) == (
        weight.shape,
        weight.dtype,
        weight.device,
        False,
    )
    assert isinstance(made, nn.Parameter)
    assert config.save_config_portable() == settings


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ArgumentError, match=r"^int8: torchao cannot be used .* pip install 'lightning-prune\[int8\]'$"):
        quantize([nn.Parameter(torch.randn(8, 8))])


def test_the_version_is_named() -> None:
    assert quantizer_version() == f"torchao {version('torchao')}"
