"""Device names and synchronisation, and the state of the global random generators."""

import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
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


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Whatever happens inside, also an error, the global generators of torch, NumPy and Python go on as if not.

    Lightning's `isolate_rng` leaves them as they are when the block raises.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # users draw from the global one
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
