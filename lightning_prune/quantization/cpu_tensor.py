"""A weight in 8 bits for the CPU, in the place of a float one: a tensor that only knows how to be a linear layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.quantization.onednn import int8_linear, quantize_rows

_Tensor: Any = Tensor  # whose annotations are narrower than what torch asks of a subclass
_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)


class CPUInt8Weight(_Tensor):
    """An int8 weight that looks like the float one: its shape, dtype and device; `F.linear` with it is `int8_linear`.

    It can be moved, cast, copied and pickled. Any other use of it is a TypeError of torch's: nothing computes in float
    unnoticed.

    Args:
        ints: (out, in) int8.
        scales: (out,) float32.
        dtype: Of the weight that this stands for.
    """

    ints: Tensor
    scales: Tensor

    def __new__(cls, ints: Tensor, scales: Tensor, dtype: torch.dtype) -> Any:
        """Makes the wrapper; the numbers are its attributes."""
        made = Tensor._make_wrapper_subclass(cls, ints.shape, dtype=dtype, device=ints.device)
        return made

    def __init__(self, ints: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.ints, self.scales = ints, scales

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """What a tracer sees: the tensors by name, and the rest."""
        return ["ints", "scales"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls: Any, tensors: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Any:
        """The weight of what `__tensor_flatten__` gave."""
        return cls(tensors["ints"], tensors["scales"], dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Is a linear layer, however its arguments are given: BEiT and EVA in timm name them."""
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # unlike torch's own, what is inside is not wrapped again
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Is detached, copied, moved and cast; the numbers stay int8."""
        if func in _SAME:
            weight = args[0]
            return cls(weight.ints, weight.scales, weight.dtype)  # the same tensors, so what is packed of them stays
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
        raise UnsupportedModelError("int8: F.linear got a weight in 8 bits as its input or bias.")
    if weight.device.type != "cpu":
        raise UnsupportedModelError(
            f"int8: weights made for the CPU are on {weight.device} now; take them off and put them on again."
        )
    return int8_linear(input, weight.ints, weight.scales, bias)


def quantize(weight: Tensor, limit: int) -> nn.Parameter:
    """Quantizes a weight for the CPU.

    Args:
        weight: (out, in) on the CPU, in float32, bfloat16 or float16.
        limit: The largest magnitude in 8 bits that the CPU can multiply; see `weight_limit`.

    Returns:
        A parameter that is a `CPUInt8Weight` of the same shape and dtype, without gradient.
    """
    # Validation runs in inference mode; what is made there could not be used in a graph with gradients later.
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(CPUInt8Weight(*quantize_rows(weight, limit), weight.dtype), requires_grad=False)
