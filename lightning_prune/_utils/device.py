"""Device names, and synchronisation of devices."""

from collections.abc import Callable
from functools import cache

import torch

from lightning_prune._utils.processor import processor_name


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished its work. Does nothing on a CPU, which runs synchronously.

    `torch.accelerator.synchronize` raises for a CPU, so the device type is checked first.
    """
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def between_runs(device: torch.device) -> Callable[[], None]:
    """A function for `InterleavedTimer.synchronize`: waits for a device, and drops the weights that autocast has cast.

    Under autocast every step of a loop casts the weights, so every timed run must.

    Args:
        device: Where the model runs.
    """

    def wait() -> None:
        torch.clear_autocast_cache()
        synchronize(device)

    return wait


@cache
def device_name(device: torch.device) -> str:
    """The product name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name() if device.type == "cpu" else device.type.upper()
