"""Replaces the weights of the linear layers of a model by int8 weights, and restores them."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.quantization.quantizer import quantize
from lightning_prune.runtimes.graph_store import version_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MULTIPLE = 8  # required by int8 matrix products on CUDA; used on all devices, to quantize the same layers


@dataclass
class _Quantized:
    """A float weight, its version when it was quantized, and the int8 weight."""

    source: nn.Parameter
    stamp: tuple[Any, ...]
    int8: nn.Parameter


class Int8Weights:
    """Int8 weights for the linear layers of a model, with dynamic activations and one scale per output channel.

    torchao (extra `int8`) makes them, by `quantize_` with `Int8DynamicActivationInt8WeightConfig`. Each token is
    quantized separately, so that an image does not depend on the others in its batch. What that gains depends on the
    device; in eager mode on a CPU it is little, and without VNNI far slower than float.

    Weights are quantized by the first `apply`. After that `apply` and `remove` only exchange Parameter objects, so a
    timer can switch between runs. `remove` restores the model exactly: the Parameter objects, `state_dict` keys and
    `requires_grad`. The model may be patched before or after, because a patch does not change Parameters.

    Every `nn.Linear` that torchao's `quantize_` supports is quantized, including the head, if its input and output
    sizes are multiples of 8. Other layers stay in float: other sizes, convolutions, `nn.MultiheadAttention`
    (torchvision), whose projections are part of one native call, and the layer of q, k and v in timm's BEiT and EVA
    where they have separate biases. Weights must be float32, bfloat16 or float16. The output of a layer has the dtype
    of its input, also under autocast, which does not affect the layer.

    While int8 weights are applied, the model is for inference only: they have no gradient, and a checkpoint contains
    them. The model can be copied, pickled, exported, moved and cast.

    Args:
        module: Any module, such as a transformer or the LightningModule around it. Weights that are replaced, changed
            or moved to another device afterwards are quantized again by the next `apply`.

    Attributes:
        quantized: Dotted paths of the quantized layers.
        kept: Dotted path of each layer that stays in float -> the reason.
        active: Whether int8 weights are applied.

    Raises:
        ArgumentError: The weights are quantized already, or otherwise no plain tensors.
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
        for path, part, reason in _matrices(module):
            if isinstance(part, nn.Linear) and not reason:
                found[path] = part
            else:
                self.kept[path] = reason
        if not found:
            reasons = "; ".join(f"{path or type(module).__name__}: {text}" for path, text in self.kept.items())
            raise UnsupportedModelError(
                f"{type(module).__name__} has no linear layer that can be quantized: {reasons or 'it has none'}."
            )
        self.quantized: tuple[str, ...] = tuple(found)
        self.active = False
        self._module, self._layers = module, list(found.values())
        self._own = self._live()
        self._dtype: torch.dtype | None = None
        self._made: dict[int, _Quantized] = {}  # by the id of the float weight, which layers may share

    def apply(self) -> None:
        """Gives the layers their int8 weights; does nothing if they have them.

        Raises:
            ArgumentError: torchao is not installed, or some weights are quantized by other means. Then nothing is
                changed.
        """
        if self.active:
            return
        live = self._live()
        kept = {key: made for key, made in self._made.items() if made.stamp == _stamp(made.source)}
        missing = list({id(weight): weight for weight in live if id(weight) not in kept}.values())
        for weight, int8 in zip(missing, quantize(missing) if missing else [], strict=True):
            kept[id(weight)] = _Quantized(weight, _stamp(weight), int8)
        self._made = {id(weight): kept[id(weight)] for weight in live}
        self._own = live
        for layer, weight in zip(self._layers, live, strict=True):
            layer.weight = self._made[id(weight)].int8
        self._dtype = _float_dtype(self._module)
        self.active = True

    def remove(self) -> None:
        """Restores the float weights; does nothing if they are in place.

        If the model was moved to another device or dtype meanwhile, so are they.
        """
        if not self.active:
            return
        dtype = _float_dtype(self._module)
        cast = None if dtype == self._dtype else dtype
        for layer, weight in zip(self._layers, self._own, strict=True):
            device = layer.weight.device
            layer.weight = weight
            if cast is not None or device != weight.device:
                with torch.inference_mode(False):
                    layer.to(device=device, dtype=cast)
        self.active = False

    def __enter__(self) -> "Int8Weights":
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Int8Weights({len(self._layers)} layers, {len(self.kept)} in float, {'on' if self.active else 'off'})"

    def _live(self) -> list[nn.Parameter]:
        """The present weights of the layers, which must be those of a float model."""
        found = []
        for layer in self._layers:
            weight = _weight(layer)
            if weight is None or type(weight) is not nn.Parameter:
                kind = type(weight).__name__
                raise ArgumentError(
                    f"`module` must have float weights, got quantized weights ({kind}); remove those first."
                )
            found.append(weight)
        return found


def _weight(module: nn.Module) -> nn.Parameter | None:
    """The parameter `weight`; None for one that is computed from others, and without one."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each layer that multiplies by a matrix, with the reason why it stays in float; an empty text if it need not.

    Without the output layer of `nn.MultiheadAttention`, as in torchao.
    """
    by_keyword = {id(part.qkv) for part in module.modules() if _passes_by_keyword(part)}
    for path, part in module.named_modules():
        linear = isinstance(part, nn.Linear) and not isinstance(part, NonDynamicallyQuantizableLinear)
        if id(part) in by_keyword:
            yield path, part, "its weight is passed to F.linear by keyword, which torchao does not support"
        elif linear or isinstance(part, nn.MultiheadAttention):
            yield path, part, layer_unsupported_reason(part)


def _passes_by_keyword(part: nn.Module) -> bool:
    """Whether it is timm's attention of BEiT or EVA with biases of q and v, which multiplies by the weight itself."""
    has_bias = isinstance(getattr(part, "q_bias", None), Tensor) and isinstance(getattr(part, "qkv", None), nn.Linear)
    return has_bias and not getattr(part, "qkv_bias_separate", False)


def layer_unsupported_reason(module: nn.Module) -> str:
    """Why a layer that multiplies by a matrix stays in float; an empty text if it can be quantized."""
    weight = _weight(module)
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are read by one native call of nn.MultiheadAttention"
    if weight is None or nn.parameter.is_lazy(weight):
        return "its weight is computed (a parametrization) or not initialised yet"
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    out, into = weight.shape
    return "" if out % _MULTIPLE == into % _MULTIPLE == 0 else f"{into} -> {out}: sizes must be multiples of 8"


def _float_dtype(module: nn.Module) -> torch.dtype | None:
    """Dtype of the first plain float parameter, which changes when the model is cast; torchao's weights keep theirs."""
    plain = (weight for weight in module.parameters() if type(weight) is nn.Parameter and weight.is_floating_point())
    return next((weight.dtype for weight in plain), None)


def _stamp(weight: Tensor) -> tuple[Any, ...]:
    """A version of the weight that changes with optimizer steps, loading and moves."""
    return weight.device, weight.dtype, weight.data_ptr(), version_of(weight)
