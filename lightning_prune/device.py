"""Waiting for devices, which work ahead of the program that feeds them."""

import platform
from functools import cache
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done all its work; a CPU always has.

    `torch.accelerator.synchronize` raises for a CPU, so the kind of device is asked first.
    """
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


@cache
def device_name(device: torch.device) -> str:
    """What the maker calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    return named[0] if named else platform.processor() or platform.machine()
