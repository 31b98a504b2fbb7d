"""The precisions of exported models, and what counts as the same model in each."""

from typing import Literal, get_args

import torch

Precision = Literal["float32", "float16", "bfloat16", "int8", "int8-dynamic"]
"""Of weights and operators; `"int8"` with ranges of activations from images, `"int8-dynamic"` of each batch."""

PRECISIONS: tuple[str, ...] = get_args(Precision)

TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1, "int8": 2e-1, "int8-dynamic": 2e-1}
"""Precision -> largest relative error of an image that agrees."""

AGREEMENT = {"float16": 0.995, "bfloat16": 0.995, "int8": 0.9, "int8-dynamic": 0.9}
"""Precision -> share of the images that need the same class. float32 is judged by its error instead."""

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of the weights in PyTorch; quantizers take them in float32."""
    return _DTYPES.get(precision, torch.float32)


def is_quantized(precision: str) -> bool:
    """Whether products are computed in 8 bits."""
    return precision.startswith("int8")
