"""Tells whether a device can run a model in int8, and if not, why; tables show the reason."""

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruneError
from lightning_prune.quantization.weights import Int8Weights

_ROWS = 32  # CUDA's int8 matrix product needs more than 16
_TOLERANCE = 0.1  # relative to the float result; 8 bits are off by 1 to 2 hundredths, saturated sums by far more


def unsupported_reason(
    device: torch.device | str, model: nn.Module | None = None, images: Tensor | None = None
) -> str | None:
    """Returns why a device cannot run int8, or None where it can; tries it.

    Args:
        device: Where the model runs.
        model: The model to quantize. One linear layer of each size and dtype is compared with float; without a model,
            one layer of 64 x 64.
        images: (B, C, H, W). If given, the model runs once with int8 weights on this batch, which also finds weights
            that are used other than in a linear layer. It is restored afterwards.

    Returns:
        None where it works, else the reason.

    Example:
        >>> from lightning_prune.quantization import unsupported_reason
        >>> unsupported_reason("cpu") is None
        True
        >>> unsupported_reason("mps")
        'no int8 matrix product on mps'
    """
    device = torch.device(device)
    if device.type in ("mps", "meta"):
        return f"no int8 matrix product on {device.type}"
    try:
        for weight in [_random(64, 64)] if model is None else _kinds(model):
            reason = _failing(weight, device)
            if reason is not None:
                return reason
        if model is not None and images is not None:
            with torch.no_grad(), Int8Weights(model):
                model(images)
    except PruneError as error:
        return str(error).removeprefix("int8: ").rstrip(".")
    except Exception as error:  # whatever a kernel of this device raises is the reason that is asked for
        return f"int8 failed in a trial on {device}: {type(error).__name__}: {_first_line(error)}"
    return None


def _random(rows: int, columns: int) -> Tensor:
    """Random numbers from a generator of its own, so the caller's random state does not change."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _kinds(model: nn.Module) -> list[Tensor]:
    """The weight of one layer for each size and dtype."""
    modules = dict(model.named_modules())
    found: dict[object, Tensor] = {}
    for path in Int8Weights(model).quantized:
        weight = modules[path].weight
        assert isinstance(weight, Tensor)
        found.setdefault((weight.shape, weight.dtype), weight)
    return list(found.values())


def _failing(weight: Tensor, device: torch.device) -> str | None:
    """Why a layer in 8 bits is unusable: its output is not that of the float layer. None where it is."""
    out, into = weight.shape
    # Not the model's own layer, which may have hooks.
    trial = nn.utils.skip_init(nn.Linear, into, out, bias=False, device=device, dtype=weight.dtype)
    rows = _random(_ROWS, into).to(device, weight.dtype)
    with torch.no_grad():
        trial.weight.copy_(weight)
        exact = trial(rows).float()
        with Int8Weights(trial):
            error = (trial(rows).float() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny)
    if error <= _TOLERANCE:
        return None
    return f"int8 is wrong on {device}: a layer {into} -> {out} is off by {error:.0%}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"
