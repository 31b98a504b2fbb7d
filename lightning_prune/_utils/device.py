"""Device names, synchronisation of devices, and the state of the global random generators."""

import platform
from functools import cache
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished its work. Does nothing on a CPU, which runs synchronously.

    `torch.accelerator.synchronize` raises for a CPU, so the device type is checked first.
    """
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


@cache
def device_name(device: torch.device) -> str:
    """The product name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    return named[0] if named else platform.processor() or platform.machine()
