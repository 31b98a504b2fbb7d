"""What else runs on the machine: load, pressure, and time that a hypervisor took. It needs nothing but Python."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune._utils.readings import NotReadable, text_of


@dataclass(frozen=True)
class CpuTimes:
    """Ticks of all cores since the system started.

    Attributes:
        total: All.
        idle: Of them without work.
        stolen: Of them that the hypervisor gave to other machines.
    """

    total: int
    idle: int
    stolen: int

    def since(self, before: "CpuTimes") -> dict[str, float]:
        """Shares of the time since an earlier reading, in percent.

        Args:
            before: The earlier reading.

        Example:
            >>> from lightning_prune._utils.system_load import CpuTimes
            >>> CpuTimes(300, 150, 10).since(CpuTimes(100, 50, 0))
            {'busy_percent': 50.0, 'stolen_percent': 5.0}
        """
        total = max(self.total - before.total, 1)
        busy = total - (self.idle - before.idle)
        stolen = self.stolen - before.stolen
        return {"busy_percent": round(100 * busy / total, 1), "stolen_percent": round(100 * stolen / total, 1)}


def cpu_times(root: Path = Path("/")) -> CpuTimes | NotReadable:
    """Reads the times of all cores.

    Args:
        root: Where `/proc` is.
    """
    text = text_of(root / "proc/stat")
    if isinstance(text, NotReadable):
        return text
    words = text.splitlines()[0].split() if text else []
    if len(words) < 9 or words[0] != "cpu" or not all(word.isdigit() for word in words[1:9]):
        return NotReadable(f"{root / 'proc/stat'} begins with {' '.join(words)[:40]!r}")
    user, nice, system, idle, waiting, *others = map(int, words[1:9])
    return CpuTimes(user + nice + system + idle + waiting + sum(others), idle + waiting, others[-1])


def read_load(root: Path = Path("/")) -> dict[str, Any]:
    """Load averages, running tasks and pressure on the processor.

    Args:
        root: Where `/proc` is.

    Returns:
        Name -> value. The pressure is the share of the last ten seconds in which some task waited for a core.
    """
    text = text_of(root / "proc/loadavg")
    words = [] if isinstance(text, NotReadable) else text.split()
    averages: Any = [float(word) for word in words[:3]]
    if len(averages) < 3:
        averages = list(os.getloadavg()) if hasattr(os, "getloadavg") else NotReadable(f"no {root / 'proc/loadavg'}")
    running = words[3].partition("/") if len(words) > 3 else None
    return {
        "load_average": averages,
        "tasks": {"running": int(running[0]), "of": int(running[2])} if running else NotReadable("no /proc/loadavg"),
        "cpu_pressure_percent": _pressure(root),
    }


def _pressure(root: Path) -> float | NotReadable:
    path = root / "proc/pressure/cpu"
    text = text_of(path)
    if isinstance(text, NotReadable):
        return text
    for word in text.split():
        if word.startswith("avg10="):
            return float(word.removeprefix("avg10="))
    return NotReadable(f"no avg10 in {path}")
