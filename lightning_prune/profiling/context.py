"""What a measured figure depends on; it travels with every figure."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from lightning_prune.compiling import is_compiled
from lightning_prune.device import device_name
from lightning_prune.patching.overlay import own_class


def measurement_context(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """Device, threads, batch, precision, compile mode and versions, as plain values.

    Call it where the model will run: inside the autocast context, with the batch on its device.

    Args:
        model: The model that is measured.
        batch: (B, channels, height, width) images.
    """
    return {
        "device": device_name(batch.device),
        "device_type": batch.device.type,
        "threads": torch.get_num_threads(),
        "batch_size": batch.shape[0],
        "image_shape": list(batch.shape[1:]),
        "precision": precision(model, batch.device),
        "compiled": is_compiled(model),
        "model": own_class(getattr(model, "_orig_mod", model)).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": str(torch.__version__),  # a str subclass, which YAML and weights_only loading refuse
        "timm": timm.__version__,
    }


def precision(model: nn.Module, device: torch.device) -> str:
    """`"bf16-mixed"` where autocast is on, else the dtype of the weights, such as `"float32"`."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        return {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}.get(dtype, f"{dtype}-mixed")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return str(weight.dtype if weight is not None else torch.get_default_dtype()).removeprefix("torch.")
