"""The int8 matrix product that torch itself has on CPUs (oneDNN), fast without VNNI too, and a linear layer of it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_ZERO = 128  # activations are unsigned in the kernel: zero is in the middle
_LIMIT = 127  # the largest magnitude of an activation in 8 bits
_LEAST = 1e-30  # of a token's largest magnitude; a token of zeros has no scale of its own

# What oneDNN makes of weights is opaque: it can be neither copied, pickled nor traced. So it lives beside the weights
# that it is made of, and as long as they do.
_packed: Any = WeakTensorKeyDictionary()


@cache
def weight_limit() -> int | None:
    """The largest magnitude that weights may have here, found by a trial on numbers where sums would saturate.

    Without VNNI a CPU adds two products of 8 bits in 16; that holds 2 · 255 · 64, but not 2 · 255 · 128.

    Returns:
        127, or 63 where more is computed wrongly; None where torch has no such kernel.

    Example:
        >>> from lightning_prune.quantization.onednn import weight_limit
        >>> weight_limit() in (127, 63, None)
        True
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return None
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.full((32, 64), 2 * _LIMIT + 1, dtype=torch.uint8)
        for limit in (127, 63):
            ints = torch.full((32, 64), -limit - 1, dtype=torch.int8)
            try:
                found = _product(rows, ints, torch.ones(32))
            except RuntimeError:  # built in, but not for this processor
                return None
            if bool((found == (2 * _LIMIT + 1 - _ZERO) * (-limit - 1) * 64).all()):
                return limit
    return None


def quantize_rows(weight: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits, symmetric, one scale for each output channel (as torchao's `PerRow`).

    Args:
        weight: (out, in), any float dtype.
        limit: The largest magnitude, 127 or 63; the most negative number is one more.

    Returns:
        (out, in) int8 and (out,) float32, whose product is the weight, rounded.

    Example:
        >>> import torch
        >>> from lightning_prune.quantization.onednn import quantize_rows
        >>> ints, scales = quantize_rows(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), 127)
        >>> ints.tolist()
        [[127, -64], [0, 0]]
    """
    exact = weight.detach().float()
    scales = exact.abs().amax(1).clamp(min=_LEAST) / (limit + 0.5)
    return (exact / scales[:, None]).round().clamp(-limit - 1, limit).to(torch.int8), scales


def int8_linear(x: Tensor, ints: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in 8 bits: each token is quantized by its own largest magnitude a, in steps of a / 127.

    y = (a / 127) · (round(127 x / a) · ints^T) · scales + bias, the sum in 32 bits. One scale for each token,
    where torch's `linear_dynamic` has one for the batch: an image does not depend on its batch-mates. No gradient.

    Args:
        x: (..., in), float32, bfloat16 or float16.
        ints: (out, in) int8, on the CPU.
        scales: (out,) float32.
        bias: (out,), or None.

    Returns:
        (..., out), of the dtype of `x`.

    Example:
        >>> import torch
        >>> from lightning_prune.quantization.onednn import int8_linear
        >>> int8_linear(torch.tensor([[127.0, -2.0]]), torch.tensor([[3, 1]], dtype=torch.int8), torch.ones(1), None)
        tensor([[379.]])
    """
    exact = x.detach().float()
    if exact.dim() > 2:
        exact = exact.flatten(0, -2)
    # Two reductions, for `aminmax` along a dimension takes ten times as long.
    most = torch.maximum(exact.amax(-1, keepdim=True), -exact.amin(-1, keepdim=True)).clamp(min=_LEAST)
    rows = (exact * (_LIMIT / most)).add_(_ZERO + 0.5).to(torch.uint8)  # cut off after the half: rounded
    multiply = _traced_product if torch.compiler.is_compiling() else _product
    y: Tensor = multiply(rows, ints, scales).mul_(most / _LIMIT)
    y = y if bias is None else y.add_(bias.detach())
    return y.view(*x.shape[:-1], ints.shape[0]).to(x.dtype)


def _product(rows: Tensor, ints: Tensor, scales: Tensor) -> Tensor:
    packed, zeros = _pack(ints)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, _ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


def _pack(ints: Tensor) -> tuple[Tensor, Tensor]:
    """The weights as oneDNN wants them, and their zero points."""
    found: tuple[Tensor, Tensor] | None = _packed.get(ints)
    if found is None:
        # Made in inference mode, it could not be used outside.
        with torch.inference_mode(False), torch.no_grad():
            packed = torch.ops.onednn.qlinear_prepack(ints, None)
            found = _packed[ints] = (packed, torch.zeros(ints.shape[0], dtype=torch.int64))
    return found


# In a graph a node of its own: inductor takes oneDNN's only with weights that are constants of the graph.
@torch.library.custom_op("lightning_prune::int8_product", mutates_args=())
def _traced_product(rows: Tensor, ints: Tensor, scales: Tensor) -> Tensor:
    return _product(rows, ints, scales)


@_traced_product.register_fake
def _(rows: Tensor, ints: Tensor, scales: Tensor) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], ints.shape[0]), dtype=torch.float32)
