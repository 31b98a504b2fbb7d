"""Limits of the process: cores that it may run on, and what its control group grants. It needs nothing but Python."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_prune._utils.readings import NotReadable, text_of

NO_LIMIT = "none"
_GROUPS = Path("sys/fs/cgroup")
_UNLIMITED_BYTES = 2**60  # version 1 has no word for it


def container_limits(root: Path = Path("/")) -> dict[str, Any]:
    """What bounds the process: affinity, and processor time and memory by control groups of both versions.

    Args:
        root: Where `/proc` and `/sys` are.

    Returns:
        Name -> value. `cpu_quota` in cores, and the periods in which the process group had used it up.
    """
    return {
        "affinity": _affinity(),
        "cpu_quota": _cpu_quota(root),
        "throttled_periods": _throttled(root),
        "memory_limit_gib": _memory_limit(root),
    }


def _affinity() -> str | NotReadable:
    """The cores that the process may run on, as ranges."""
    if not hasattr(os, "sched_getaffinity"):
        return NotReadable("this system does not tell the affinity of a process")
    return ranges(os.sched_getaffinity(0))


def ranges(numbers: set[int]) -> str:
    """Whole numbers as ranges.

    Args:
        numbers: In any order.

    Example:
        >>> from lightning_prune._utils.process_limits import ranges
        >>> ranges({0, 1, 2, 5, 7, 8})
        '0-2,5,7-8'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _cpu_quota(root: Path) -> float | str | NotReadable:
    found: list[float] = []
    for folder in _folders(root, "cpu"):
        text = text_of(folder / "cpu.max")
        if isinstance(text, NotReadable):  # version 1
            quota, period = (text_of(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            text = f"{quota} {period}"
        words = text.split()
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
            found.append(int(words[0]) / int(words[1]))
    return round(min(found), 3) if found else _none_or_unknown(root, "cpu")


def _throttled(root: Path) -> dict[str, int] | NotReadable:
    for folder in _folders(root, "cpu"):
        text = text_of(folder / "cpu.stat")
        lines = [] if isinstance(text, NotReadable) else [line.split() for line in text.splitlines()]
        known = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}
        if "nr_throttled" in known and "nr_periods" in known:
            return {"throttled": known["nr_throttled"], "of": known["nr_periods"]}
    return NotReadable(f"no nr_throttled in a cpu.stat of {root / _GROUPS}")


def _memory_limit(root: Path) -> float | str | NotReadable:
    texts = [
        text_of(folder / name)
        for folder in _folders(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    found = [int(text) for text in texts if isinstance(text, str) and text.isdigit()]
    limits = [each for each in found if each < _UNLIMITED_BYTES]
    return round(min(limits) / 2**30, 2) if limits else _none_or_unknown(root, "memory")


def _none_or_unknown(root: Path, controller: str) -> str | NotReadable:
    """That there is no limit, where the control groups can be looked at."""
    groups = root / _GROUPS
    if (groups / "cgroup.controllers").is_file() or any(_folders(root, controller)):
        return NO_LIMIT
    return NotReadable(f"no control group for {controller} in {groups}")


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's control group and of those that it is in, innermost first."""
    text = text_of(root / "proc/self/cgroup")
    lines = [] if isinstance(text, NotReadable) else [line.split(":", 2) for line in text.splitlines()]
    own = {name: words[2] for words in lines if len(words) == 3 for name in words[1].split(",")}
    base = root / _GROUPS
    if not (base / "cgroup.controllers").is_file():  # version 1: a tree for each controller
        base = base / controller
    inner = own.get(controller, own.get("", "/")).strip("/")
    folder = base / inner if inner else base
    while folder != base:
        if folder.is_dir():  # in a container the path may be that of the host
            yield folder
        folder = folder.parent
    if base.is_dir():
        yield base
