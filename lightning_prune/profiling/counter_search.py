"""Which energy counter a device has, or a plain statement that it has none."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lightning_prune.profiling.counters import POWERCAP, EnergyCounter, NoCounterError, NvmlCounter, RaplCounter
from lightning_prune.profiling.zeus import ZeusCounter

NO_COUNTER = "n/a (no energy counter on this device)"
NOT_READABLE = "n/a (the energy counter of this device is not readable by this user)"


@dataclass(frozen=True)
class Unavailable:
    """A device whose energy cannot be told.

    Attributes:
        text: What a table says in the figure's place; also what `str` gives.
        reason: What was looked for, and what was found.
    """

    text: str
    reason: str

    def __str__(self) -> str:
        return self.text


def find_counter(
    device: torch.device | str, powercap: Path = POWERCAP, sleep: Callable[[float], None] = time.sleep
) -> EnergyCounter | Unavailable:
    """Finds the energy counter of a device; counters only, for sampled power would be a guess.

    A CUDA device: zeus where installed, else NVML. The CPU: RAPL as Linux shows it, else zeus, whose daemon may read
    what the user may not. Apple's GPU: zeus. A counter that stands still, as some virtual machines show, is none.

    Args:
        device: What computes.
        powercap: Where Linux shows RAPL.
        sleep: Waits for so many seconds; replaced in tests.

    Example:
        >>> from lightning_prune.profiling.counter_search import find_counter
        >>> print(find_counter("meta"))
        n/a (no energy counter on this device)
    """
    device = torch.device(device)
    reasons, exists = [], False
    for make in _candidates(device, powercap):
        try:
            counter = make()
        except NoCounterError as error:
            reasons.append(str(error))
            exists = exists or error.exists
            continue
        before = counter.joules()
        sleep(2 * counter.resolution)
        if counter.joules() > before:
            return counter
        reasons.append(f"{counter.name} stands still")
    reason = "; ".join(reasons) or f"none is known for {device.type} devices"
    return Unavailable(NOT_READABLE if exists else NO_COUNTER, reason)


@cache
def device_counter(device: torch.device) -> EnergyCounter | Unavailable:
    """The counter of a device, looked for once in a process."""
    return find_counter(device)


def _candidates(device: torch.device, powercap: Path) -> list[Callable[[], EnergyCounter]]:
    by_zeus: Callable[[], EnergyCounter] = lambda: ZeusCounter(device)  # noqa: E731
    if device.type == "cuda":
        return [by_zeus, lambda: NvmlCounter(device)]
    if device.type == "cpu":
        return [lambda: RaplCounter(powercap), by_zeus]
    return [by_zeus] if device.type == "mps" else []
