"""Gives the linear layers of a model 8-bit weights, and takes them back."""

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
_MULTIPLE = 8  # of int8 matrix products on CUDA; on all devices, for a comparison of the same layers
_TAKEN = "`module` must have float weights, got quantized weights; remove those first."


@dataclass
class _Layer:
    """A linear layer, its weight in 8 bits, and the state of the float weight that was quantized."""

    module: nn.Module
    source: nn.Parameter
    stamp: tuple[Any, ...]
    quantized: nn.Parameter


class Int8Weights:
    """Int8 weights for the linear layers of a model: dynamic activations, weights per output channel.

    On a CPU the kernel is torch's own (oneDNN), in eager mode and compiled. On other devices, and in builds of torch
    without it, the kernel is torchao's (extra `int8`), which is far slower than float on a CPU without VNNI. Both
    quantize each token by itself, so an image does not depend on its batch-mates. Where the 16-bit sums of a CPU would
    saturate, weights have 7 bits; with torchao, activations have, too.

    Weights are quantized once. `apply` and `remove` then only exchange Parameter objects, so a timer can switch between
    two runs. After `remove` the model is what it was to the bit: the same Parameter objects, `state_dict` keys and
    `requires_grad`. The model may be patched before or after, as a patch does not touch Parameters.

    Quantized is every `nn.Linear` that torchao's `quantize_` takes, the head included, whose input and output sizes
    are multiples of 8. In float stay: other sizes; convolutions; and `nn.MultiheadAttention` (torchvision), whose
    projections are read by one native call, so that there two thirds of the matrix products are in 8 bits. Weights are
    float32, bfloat16 or float16. What a layer returns has the dtype of its input, under autocast too, which does not
    reach inside it.

    While it is on, the model is for inference: int8 weights have no gradient, nothing flows back through these layers
    on a CPU, and a checkpoint saved then holds them. It can be copied, pickled, exported and cast. Moved to another
    device it asks to be taken off and put on again where its weights were made for the CPU.

    Args:
        module: Any module, as a transformer or the LightningModule around it. Weights that are replaced, changed or
            moved to another device afterwards are quantized anew by the next `apply`.

    Attributes:
        quantized: Dotted paths of the layers in 8 bits.
        kept: Dotted path of each layer that stays in float -> why.
        active: Whether it is on.

    Raises:
        ArgumentError: The device needs torchao, which is not installed, or the weights are quantized already.
        UnsupportedModelError: There is no layer to quantize; says why each stays.

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
            raise ArgumentError(_TAKEN)
        if not found:
            reasons = "; ".join(f"{path or type(module).__name__}: {why}" for path, why in self.kept.items())
            raise UnsupportedModelError(
                f"{type(module).__name__} has no linear layer that can be quantized: {reasons or 'it has none'}."
            )
        self.quantized: tuple[str, ...] = tuple(found)
        self.active = False
        made: dict[int, nn.Parameter] = {}  # a weight that several layers share is quantized once
        self._layers = [self._layer(part, made) for part in found.values()]

    def apply(self) -> None:
        """Gives the layers their int8 weights; does nothing where they are on.

        Raises:
            ArgumentError: Some weights are quantized by other means. Nothing is changed then.
        """
        if self.active:
            return
        made: dict[int, nn.Parameter] = {}
        fresh = []
        for layer in self._layers:
            live = layer.module._parameters["weight"]
            if live is None or is_quantized(live):
                raise ArgumentError(_TAKEN)
            current = layer.source is live and layer.stamp == _stamp(live)
            fresh.append(layer if current else self._layer(layer.module, made))
        self._layers = fresh  # everything that can fail is done
        for layer in fresh:
            layer.module._parameters["weight"] = layer.quantized
        self.active = True

    def remove(self) -> None:
        """Gives the layers their own weights back; does nothing where these are in place.

        A model that was moved to another device or dtype meanwhile gets them there.
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
        """Whose kernels compute in 8 bits: `oneDNN` (torch's own), `torchao`, or both."""
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
    """Whether a weight is quantized already, by this package or by whatever means of torchao."""
    return any(base.__name__ in ("CPUInt8Weight", "TorchAOBaseTensor") for base in type(weight).__mro__)


def layer_unsupported_reason(module: nn.Module) -> str | None:
    """Why a layer that multiplies by a matrix stays in float; None if it can be quantized."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are read by one native call of nn.MultiheadAttention"
    if not isinstance(weight, nn.Parameter) or nn.parameter.is_lazy(weight):
        return "its weight is computed (a parametrization) or not there yet"
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    out, into = weight.shape
    return None if out % _MULTIPLE == into % _MULTIPLE == 0 else f"{into} -> {out}: sizes must be multiples of 8"


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, and attention that has its matrices inside; as torchao does, not the latter's output layer."""
    for path, part in module.named_modules():
        linear = isinstance(part, nn.Linear) and not isinstance(part, NonDynamicallyQuantizableLinear)
        if linear or isinstance(part, nn.MultiheadAttention):
            yield path, part


def _follow(source: nn.Parameter, now: Tensor | None) -> nn.Parameter:
    """The float weight where, and in the dtype in which, the int8 one is now; the same object wherever torch can."""
    if now is None or (now.device, now.dtype) == (source.device, source.dtype):
        return source
    moved = source.data.to(device=now.device, dtype=now.dtype)
    if not torch._has_compatible_shallow_copy_type(source.data, moved):  # as `Module.to` does: the meta device, say
        return nn.Parameter(moved, source.requires_grad)
    source.data = moved
    return source


def _stamp(weight: Tensor) -> tuple[Any, ...]:
    """Changes with the weight: by an optimizer step, by loading, by a move."""
    version = None if weight.is_inference() else weight._version
    return weight.device, weight.dtype, weight.data_ptr(), version
