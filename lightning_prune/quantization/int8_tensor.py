"""The int8 weight for torchao. Only this file imports torchao; it must be imported via `backend`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.quantization import Int8Tensor, PerRow
from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
from torchao.utils import should_reduce_range


class Int8Weight(Int8Tensor):
    """Torchao's int8 weight, with support for keyword arguments of `F.linear`.

    torchao only accepts positional arguments of `linear`, but timm's BEiT and EVA, which have a separate bias, call
    `F.linear(x, weight=..., bias=...)`.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Converts keyword arguments of `linear` to positional ones; everything else is left to torchao."""
        if func is F.linear and kwargs:
            args, kwargs = _in_order(*args, **kwargs), {}
        return super().__torch_function__(func, types, args, kwargs or {})


@Int8Weight.implements(torch.ops.aten._to_copy.default)
def _cast(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Keeps the dtype of a model that is cast, which torchao's own function loses; the data stay int8."""
    weight = args[0]
    to = weight._get_to_kwargs(*args[1:], **kwargs)
    names = (*weight.tensor_data_names, *weight.optional_tensor_data_names)
    tensors = {name: getattr(weight, name) for name in names}
    moved = {name: tensor if tensor is None else tensor.to(to["device"]) for name, tensor in tensors.items()}
    more = (*weight.tensor_attribute_names, *weight.optional_tensor_attribute_names)
    attributes = {name: getattr(weight, name) for name in more}
    cast = type(weight)(**moved, **{**attributes, "dtype": to["dtype"]})
    return return_and_correct_aliasing(func, args, kwargs, cast)


def _in_order(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def quantize(weight: Tensor) -> nn.Parameter:
    """Quantizes a weight as torchao's `Int8DynamicActivationInt8WeightConfig` does.

    Symmetric, one scale for each output channel; activations are quantized in each forward pass, one scale for each
    token, so that an image does not depend on the others in its batch. Unlike that config, this function does not
    change inductor's settings for the whole process, which would affect how the float model is compiled. On CPUs
    without VNNI half of the range is used, because their 16-bit sums would saturate (as torchao recommends).

    Args:
        weight: (out, in) in float32, bfloat16 or float16.

    Returns:
        A parameter around an `Int8Weight` of the same shape, dtype and device, without gradient.
    """
    narrow = should_reduce_range(weight.device)
    activations = QuantizeTensorToInt8Kwargs(granularity=PerRow(), reduce_range=narrow)
    # Validation runs in inference mode, and inference tensors cannot be used in a graph with gradients later.
    with torch.inference_mode(False), torch.no_grad():
        quantized = Int8Weight.from_hp(
            weight.detach(), granularity=PerRow(), act_quant_kwargs=activations, reduce_range=narrow
        )
        return nn.Parameter(quantized, requires_grad=False)
