"""Device names, synchronisation of devices, and the state of the global random generators."""

import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
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


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restores the global random state of torch, NumPy and Python on exit, also after an exception.

    Lightning's `isolate_rng` does not restore it after an exception.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # users use the global generator
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
