"""torch's int8 matrix product on CPUs (oneDNN), which is fast even without VNNI, and a linear layer with it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_ZERO = 128  # activations are unsigned in the kernel: zero is in the middle
_LIMIT = 127  # the largest magnitude of an activation in 8 bits
_LEAST = 1e-30  # lower limit for the largest magnitude of a token or row, which may be all zeros

# Packed weights of oneDNN are opaque: they cannot be copied, pickled or traced. They are kept as long as the weights.
_packed: Any = WeakTensorKeyDictionary()


@cache
def weight_limit() -> int | None:
    """The largest magnitude of int8 weights on this CPU, found by a trial with large sums.

    Without VNNI a CPU adds two 8-bit products in 16 bits, which can hold 2 · 255 · 64 but not 2 · 255 · 128.

    Returns:
        127, or 63 if larger weights give wrong results; None if torch has no such kernel.

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
            except RuntimeError:  # not supported on this processor
                return None
            if bool((found == (2 * _LIMIT + 1 - _ZERO) * (-limit - 1) * 64).all()):
                return limit
    return None


def quantize_rows(weight: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Quantizes a weight to int8, symmetrically, with one scale for each output channel (like torchao's `PerRow`).

    Args:
        weight: (out, in), any float dtype.
        limit: The largest magnitude, 127 or 63; that of negative numbers is one larger.

    Returns:
        (out, in) int8 and (out,) float32 scales; their product approximates the weight.

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
    """A linear layer in int8. Each token is quantized in steps of a / 127, where a is its largest magnitude.

    y = (a / 127) · (round(127 x / a) · ints^T) · scales + bias, with 32-bit sums. There is one scale for
    each token, not one for the batch as in torch's `linear_dynamic`, so an image does not depend on the others in its
    batch. It has no gradient.

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
    # Two reductions, because `aminmax` along a dimension takes ten times as long.
    most = torch.maximum(exact.amax(-1, keepdim=True), -exact.amin(-1, keepdim=True)).clamp(min=_LEAST)
    rows = (exact * (_LIMIT / most)).add_(_ZERO + 0.5).to(torch.uint8)  # adding 0.5 before truncation rounds
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
    """The weights packed for oneDNN, and their zero points."""
    found: tuple[Tensor, Tensor] | None = _packed.get(ints)
    if found is None:
        # Inference tensors could not be used outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            packed = torch.ops.onednn.qlinear_prepack(ints, None)
            found = _packed[ints] = (packed, torch.zeros(ints.shape[0], dtype=torch.int64))
    return found


# A custom operator, because inductor only supports oneDNN's with weights that are constants of the graph.
@torch.library.custom_op("lightning_prune::int8_product", mutates_args=())
def _traced_product(rows: Tensor, ints: Tensor, scales: Tensor) -> Tensor:
    return _product(rows, ints, scales)


@_traced_product.register_fake
def _(rows: Tensor, ints: Tensor, scales: Tensor) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], ints.shape[0]), dtype=torch.float32)
