"""Checks whether a device can run a model in int8."""

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruneError
from lightning_prune.quantization.weights import Int8Weights

_ROWS = (1, 32)  # CUDA's int8 matrix product needs more than 16, and there may be another path for fewer
_TOLERANCE = 0.1  # relative error; 0.01 to 0.02 are normal with 8 bits, saturated sums give far more


def unsupported_reason(
    device: torch.device | str, model: nn.Module | None = None, images: Tensor | None = None
) -> str | None:
    """Why a device cannot run a model in int8; None if it can. This is found out by a trial.

    Args:
        device: Where the model runs.
        model: The model to quantize. One linear layer of each size and dtype is compared with float; without a model,
            one layer of 64 x 64 is.
        images: (B, C, H, W). If given, the model runs once with int8 weights on this batch, which also detects weights
            that are not only used in linear layers. The model is restored afterwards.

    Returns:
        The reason, or None.

    Example:
        >>> from lightning_prune.quantization import unsupported_reason
        >>> unsupported_reason("cpu") is None
        True
        >>> unsupported_reason("cpu", torch.nn.Linear(3, 5))
        'Linear has no linear layer that can be quantized: Linear: 3 -> 5: sizes must be multiples of 8'
    """
    device = torch.device(device)
    try:
        for weight in [_random(64, 64)] if model is None else _distinct_weights(model):
            reason = _error_reason(weight, device)
            if reason is not None:
                return reason
        if model is not None and images is not None:
            with torch.no_grad(), Int8Weights(model):
                model(images)
    except PruneError as error:
        return str(error).removeprefix("int8: ").rstrip(".")
    except Exception as error:  # the kernels of a device may raise anything, which is the reason
        return f"int8 failed in a trial on {device}: {type(error).__name__}: {_first_line(error)}"
    return None


def _random(rows: int, columns: int) -> Tensor:
    """Random numbers from a separate generator, so that the global random state does not change."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _distinct_weights(model: nn.Module) -> list[Tensor]:
    """One weight for each size and dtype."""
    modules = dict(model.named_modules())
    found: dict[object, Tensor] = {}
    for path in Int8Weights(model).quantized:
        weight = modules[path].weight
        assert isinstance(weight, Tensor)
        found.setdefault((weight.shape, weight.dtype), weight)
    return list(found.values())


def _error_reason(weight: Tensor, device: torch.device) -> str | None:
    """Why an int8 layer cannot be used: its output differs too much from the float layer. None if it does not."""
    out, into = weight.shape
    # A new layer, because that of the model may have hooks.
    trial = nn.utils.skip_init(nn.Linear, into, out, bias=False, device=device, dtype=weight.dtype)
    with torch.no_grad():
        trial.weight.copy_(weight)
    int8 = Int8Weights(trial)
    for count in _ROWS:
        rows = _random(count, into).to(device, weight.dtype)
        with torch.no_grad():
            exact = trial(rows).float()
            with int8:
                error = (trial(rows).float() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny)
        if not error <= _TOLERANCE:  # NaN is not
            return f"int8 is inaccurate on {device}: a layer {into} -> {out} has an error of {float(error):.0%}"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"
