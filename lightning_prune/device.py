"""Waiting for devices, which work ahead of the program that feeds them."""

import torch


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done all its work; a CPU always has.

    `torch.accelerator.synchronize` raises for a CPU, so the kind of device is asked first.
    """
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
