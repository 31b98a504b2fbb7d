"""Replaces the weights of the linear layers of a model by int8 weights, and restores them."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.quantization.backend import int8_backend, quantizer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MULTIPLE = 8  # required by int8 matrix products on CUDA; used on all devices, to quantize the same layers
_QUANTIZED = "`module` must have float weights, got quantized weights; remove those first."


@dataclass
class _Layer:
    """A linear layer, its int8 weight, and the version of the float weight that was quantized."""

    module: nn.Module
    source: nn.Parameter
    stamp: tuple[Any, ...]
    quantized: nn.Parameter


class Int8Weights:
    """Int8 weights for the linear layers of a model, with dynamic activations and one scale per output channel.

    On a CPU the kernel is torch's own (oneDNN), in eager mode and compiled. On other devices, and in builds of torch
    without it, the kernel is torchao's (extra `int8`), which is far slower than float on a CPU without VNNI. Both
    quantize each token separately, so an image does not depend on the others in its batch. If the 16-bit sums of a CPU
    would saturate, weights have 7 bits, and with torchao activations too.

    Weights are quantized once. `apply` and `remove` only exchange Parameter objects, so a timer can switch between
    runs. `remove` restores the model exactly: the Parameter objects, `state_dict` keys and `requires_grad`. The model
    may be patched before or after, because a patch does not change Parameters.

    Every `nn.Linear` that torchao's `quantize_` supports is quantized, including the head, if its input and output
    sizes are multiples of 8. Other layers stay in float: other sizes, convolutions, and `nn.MultiheadAttention`
    (torchvision), whose projections are part of one native call; there two thirds of the matrix products are in int8.
    Weights must be float32, bfloat16 or float16. The output of a layer has the dtype of its input, also under autocast,
    which does not affect the layer.

    While int8 weights are applied, the model is for inference only: they have no gradient, gradients do not flow
    through these layers on a CPU, and a checkpoint contains them. The model can be copied, pickled, exported and cast.
    If it was quantized on a CPU and is moved to another device, the weights must be removed and applied again.

    Args:
        module: Any module, such as a transformer or the LightningModule around it. Weights that are replaced, changed
            or moved to another device afterwards are quantized again by the next `apply`.

    Attributes:
        quantized: Dotted paths of the quantized layers.
        kept: Dotted path of each layer that stays in float -> the reason.
        active: Whether int8 weights are applied.

    Raises:
        ArgumentError: The device needs torchao, which is not installed, or the weights are quantized already.
        UnsupportedModelError: There is no layer to quantize; gives the reason for each.

    Example:
        >>> import torch
        >>> from lightning_prune.quantization import Int8Weights
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 10)).eval()
        >>> int8 = Int8Weights(model)
        >>> int8.quantized, int8.kept
        (('0',), {'2': '64 -> 10: sizes must be multiples of 8'})
        >>> images = torch.randn(4, 32)
        >>> with torch.no_grad():
        ...     dense = model(images)
        ...     with int8:
        ...         error = (model(images) - dense).abs().max()
        ...     bool(0 < error < 0.1), torch.equal(model(images), dense)
        (True, True)
    """

    def __init__(self, module: nn.Module) -> None:
        found: dict[str, nn.Linear] = {}
        self.kept: dict[str, str] = {}
        for path, part in _matrices(module):
            reason = layer_unsupported_reason(part)
            if reason is None and isinstance(part, nn.Linear):
                found[path] = part
            elif reason is not None:
                self.kept[path] = reason
        if any(is_quantized(part.weight) for part in found.values()):
            raise ArgumentError(_QUANTIZED)
        if not found:
            reasons = "; ".join(f"{path or type(module).__name__}: {text}" for path, text in self.kept.items())
            raise UnsupportedModelError(
                f"{type(module).__name__} has no linear layer that can be quantized: {reasons or 'it has none'}."
            )
        self.quantized: tuple[str, ...] = tuple(found)
        self.active = False
        made: dict[int, nn.Parameter] = {}  # a weight that several layers share is quantized once
        self._layers = [self._layer(part, made) for part in found.values()]

    def apply(self) -> None:
        """Gives the layers their int8 weights; does nothing if they have them.

        Raises:
            ArgumentError: Some weights are quantized by other means. Then nothing is changed.
        """
        if self.active:
            return
        made: dict[int, nn.Parameter] = {}
        fresh = []
        for layer in self._layers:
            live = layer.module._parameters["weight"]
            if live is None or is_quantized(live):
                raise ArgumentError(_QUANTIZED)
            current = layer.source is live and layer.stamp == _stamp(live)
            fresh.append(layer if current else self._layer(layer.module, made))
        self._layers = fresh  # nothing below can fail
        for layer in fresh:
            layer.module._parameters["weight"] = layer.quantized
        self.active = True

    def remove(self) -> None:
        """Restores the float weights; does nothing if they are in place.

        If the model was moved to another device or dtype meanwhile, so are they.
        """
        if not self.active:
            return
        own = [_follow(layer.source, layer.module._parameters["weight"]) for layer in self._layers]
        for layer, weight in zip(self._layers, own, strict=True):
            layer.module._parameters["weight"] = weight
        self.active = False

    def __enter__(self) -> "Int8Weights":
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def backend(self) -> str:
        """The libraries of the int8 kernels: `oneDNN` (part of torch), `torchao`, or both."""
        return " and ".join(sorted({int8_backend(layer.source.device) for layer in self._layers}))

    def __repr__(self) -> str:
        return f"Int8Weights({len(self._layers)} layers, {len(self.kept)} in float, {'on' if self.active else 'off'})"

    def _layer(self, module: nn.Module, made: dict[int, nn.Parameter]) -> _Layer:
        source = module._parameters["weight"]
        assert source is not None
        if id(source) not in made:
            made[id(source)] = quantizer(source.device)(source)
        return _Layer(module, source, _stamp(source), made[id(source)])


def is_quantized(weight: object) -> bool:
    """Whether a weight is already quantized, by this package or by torchao."""
    return any(base.__name__ in ("CPUInt8Weight", "TorchAOBaseTensor") for base in type(weight).__mro__)


def layer_unsupported_reason(module: nn.Module) -> str | None:
    """Why a layer that multiplies by a matrix stays in float; None if it can be quantized."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are read by one native call of nn.MultiheadAttention"
    if not isinstance(weight, nn.Parameter) or nn.parameter.is_lazy(weight):
        return "its weight is computed (a parametrization) or not initialised yet"
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    out, into = weight.shape
    return None if out % _MULTIPLE == into % _MULTIPLE == 0 else f"{into} -> {out}: sizes must be multiples of 8"


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and `nn.MultiheadAttention`, without the output layer of the latter, as in torchao."""
    for path, part in module.named_modules():
        linear = isinstance(part, nn.Linear) and not isinstance(part, NonDynamicallyQuantizableLinear)
        if linear or isinstance(part, nn.MultiheadAttention):
            yield path, part


def _follow(source: nn.Parameter, now: Tensor | None) -> nn.Parameter:
    """Moves the float weight to the device and dtype of the int8 weight; returns the same object if torch allows it."""
    if now is None or (now.device, now.dtype) == (source.device, source.dtype):
        return source
    moved = source.data.to(device=now.device, dtype=now.dtype)
    if not torch._has_compatible_shallow_copy_type(source.data, moved):  # as `Module.to` does
        return nn.Parameter(moved, source.requires_grad)
    source.data = moved
    return source


def _stamp(weight: Tensor) -> tuple[Any, ...]:
    """A version of the weight that changes with optimizer steps, loading and moves."""
    version = None if weight.is_inference() else weight._version
    return weight.device, weight.dtype, weight.data_ptr(), version
