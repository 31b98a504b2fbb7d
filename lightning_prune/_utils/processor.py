"""The processor at hand: its name, and how many of its cores may be used.

It needs nothing but Python, as `lightning_prune.bundle` copies this file to devices without torch.
"""

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """The product name of the processor, or of the board where the system does not say that."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    if named:
        return named[0]
    board = Path("/proc/device-tree/model")  # as of a Raspberry Pi with a 64-bit system
    if board.exists():
        return board.read_text(errors="replace").strip("\0 \n")
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The number of logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
