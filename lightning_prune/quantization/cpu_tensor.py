"""An int8 weight for the CPU: a tensor subclass that can only be used in linear layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.quantization.onednn import int8_linear, quantize_rows

_Tensor: Any = Tensor  # its annotations are narrower than torch's protocol for subclasses
_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)


class CPUInt8Weight(_Tensor):
    """An int8 weight with the shape, dtype and device of the float weight; `F.linear` with it calls `int8_linear`.

    It can be moved, cast, copied and pickled. Any other use raises a TypeError in torch, so nothing is computed in
    float by accident.

    Args:
        ints: (out, in) int8.
        scales: (out,) float32.
        dtype: Dtype of the float weight.
    """

    ints: Tensor
    scales: Tensor

    def __new__(cls, ints: Tensor, scales: Tensor, dtype: torch.dtype) -> Any:
        """Creates the wrapper; the data are in its attributes."""
        weight = Tensor._make_wrapper_subclass(cls, ints.shape, dtype=dtype, device=ints.device)
        return weight

    def __init__(self, ints: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.ints, self.scales = ints, scales

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Names of the inner tensors and the dtype, for tracing."""
        return ["ints", "scales"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls: Any, tensors: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Any:
        """The inverse of `__tensor_flatten__`."""
        return cls(tensors["ints"], tensors["scales"], dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handles `F.linear`, also with keyword arguments, as in timm's BEiT and EVA."""
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # unlike in torch's default, results are not wrapped
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handles detaching, copying, moving and casting; the data stay int8."""
        if func in _SAME:
            weight = args[0]
            return cls(weight.ints, weight.scales, weight.dtype)  # the same tensors, so that their packed form is found
        if func is _aten.clone.default:
            return cls(args[0].ints.clone(), args[0].scales.clone(), args[0].dtype)
        if func is _aten._to_copy.default:
            weight, to = args[0], kwargs or {}
            device = to.get("device") or weight.device
            ints, scales = (tensor.to(device, copy=True) for tensor in (weight.ints, weight.scales))
            return cls(ints, scales, to.get("dtype") or weight.dtype)
        return NotImplemented


torch.serialization.add_safe_globals([CPUInt8Weight])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, CPUInt8Weight):
        raise UnsupportedModelError("int8: F.linear got an int8 weight as its input or bias.")
    if weight.device.type != "cpu":
        raise UnsupportedModelError(
            f"int8: weights quantized for the CPU are on {weight.device}; remove and apply them again."
        )
    return int8_linear(input, weight.ints, weight.scales, bias)


def quantize(weight: Tensor, limit: int) -> nn.Parameter:
    """Quantizes a weight for the CPU.

    Args:
        weight: (out, in) on the CPU, in float32, bfloat16 or float16.
        limit: The largest magnitude of an int8 weight; see `weight_limit`.

    Returns:
        A parameter that is a `CPUInt8Weight` of the same shape and dtype, without gradient.
    """
    # Validation runs in inference mode, and inference tensors cannot be used in a graph with gradients later.
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(CPUInt8Weight(*quantize_rows(weight, limit), weight.dtype), requires_grad=False)
