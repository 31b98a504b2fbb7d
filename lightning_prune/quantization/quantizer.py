"""Quantizes weights by torchao, which is optional and takes seconds to import: it is imported when it is used."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ArgumentError


def quantizer_version() -> str:
    """The quantizer with its version, on which results depend.

    Example:
        >>> from lightning_prune.quantization.quantizer import quantizer_version
        >>> quantizer_version().split()[0]
        'torchao'
    """
    try:
        return f"torchao {version('torchao')}"
    except PackageNotFoundError:
        return "torchao, which is not installed"


def quantize(weights: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Quantizes weights of linear layers as `torchao.quantization.Int8DynamicActivationInt8WeightConfig` says.

    Symmetric, one scale for each output channel. In each forward pass the inputs of the layer are quantized as well,
    with one scale for each token, so that an image does not depend on the others in its batch. On CPUs without VNNI
    half of the range is used, because their 16-bit sums would saturate, as torchao recommends.

    Args:
        weights: (out, in) each, in float32, bfloat16 or float16. They stay as they are.

    Returns:
        One parameter for each, of the same shape, dtype and device, without gradient.

    Raises:
        ArgumentError: If torchao cannot be imported; names the extra.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerRow, quantize_
        from torchao.utils import should_reduce_range
    except ImportError as error:
        raise ArgumentError(f"int8: torchao cannot be used ({error}); pip install 'lightning-prune[int8]'") from error

    made = []
    # Validation runs in inference mode, and inference tensors cannot be used in a graph with gradients later.
    with torch.inference_mode(False), torch.no_grad():
        for weight in weights:
            # torchao leaves a method on the layers that it quantizes, hence a layer of our own.
            layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
            config = Int8DynamicActivationInt8WeightConfig(
                granularity=PerRow(),
                reduce_range=should_reduce_range(weight.device),
                set_inductor_config=False,  # would change how the float model is compiled
            )
            quantize_(layer, config, lambda *_: True)
            made.append(layer.weight)
    return made
