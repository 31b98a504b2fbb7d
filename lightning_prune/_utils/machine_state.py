"""What makes a machine slower or faster today: governor, frequency, throttling, temperature, power mode.

It needs nothing but Python.
"""

import platform
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from lightning_prune._utils.readings import NotReadable, number_of, numbered, printed_by, text_of

_CPUS = Path("sys/devices/system/cpu")
_ONLINE = ("1", "2")  # of fixed and of programmable voltage


def read_state(root: Path = Path("/")) -> dict[str, Any]:
    """Governor, frequency, turbo, throttling, temperature and power of the machine now.

    Args:
        root: Where `/proc` and `/sys` are.

    Returns:
        Name -> value; of the cores that differ, how many have which.
    """
    cpus = numbered(root / _CPUS, "cpu")
    return {
        "governor": _of_cores(root, cpus, "cpufreq/scaling_governor"),
        "frequency_driver": _of_cores(root, cpus, "cpufreq/scaling_driver"),
        "energy_preference": _of_cores(root, cpus, "cpufreq/energy_performance_preference"),
        "frequency_mhz": _current_mhz(root, cpus),
        "cores_by_frequency_limit": _limit_mhz(root, cpus),
        "turbo": _turbo(root),
        "throttled_so_far": _throttle_counts(root, cpus),
        "temperatures_celsius": _temperatures(root),
        "power_mode": _power_mode(root),
        "power_source": _power_source(root),
    }


def _of_cores(root: Path, cpus: list[Path], name: str) -> str | dict[str, int] | NotReadable:
    texts = [text_of(cpu / name) for cpu in cpus]
    counted = Counter(text for text in texts if isinstance(text, str))
    if not counted:
        return NotReadable(f"no {root / _CPUS}/cpu*/{name}")
    return next(iter(counted)) if len(counted) == 1 else dict(counted)


def _current_mhz(root: Path, cpus: list[Path]) -> dict[str, float | str] | NotReadable:
    """The frequencies now; those of `/proc/cpuinfo` where the system has no others, which virtual machines make up."""
    source = "scaling_cur_freq"
    found = [each / 1000 for cpu in cpus if isinstance(each := number_of(cpu / f"cpufreq/{source}"), int)]
    if not found:
        source, text = "/proc/cpuinfo", text_of(root / "proc/cpuinfo")
        lines = [] if isinstance(text, NotReadable) else re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)
        found = [float(each) for each in lines]
    if not found:
        return NotReadable(f"no {root / _CPUS}/cpu*/cpufreq/scaling_cur_freq and no cpu MHz in {root / 'proc/cpuinfo'}")
    low, mid, high = (round(each) for each in (min(found), median(found), max(found)))
    return {"least": low, "median": mid, "most": high, "by": source}


def _limit_mhz(root: Path, cpus: list[Path]) -> dict[str, int] | NotReadable:
    """The highest frequency that the governor may choose, which can be less than the processor's -> cores."""
    name = "cpufreq/scaling_max_freq"
    found = [each for cpu in cpus if isinstance(each := number_of(cpu / name), int)]
    counted = dict(Counter(f"{each // 1000} MHz" for each in found))
    return counted or NotReadable(f"no {root / _CPUS}/cpu*/{name}")


def _turbo(root: Path) -> str | NotReadable:
    off = text_of(root / _CPUS / "intel_pstate/no_turbo")
    boost = text_of(root / _CPUS / "cpufreq/boost")
    if isinstance(off, str):
        return {"0": "on", "1": "off"}.get(off, off)
    if isinstance(boost, str):
        return {"1": "on", "0": "off"}.get(boost, boost)
    return NotReadable(f"no intel_pstate/no_turbo and no cpufreq/boost in {root / _CPUS}")


def _throttle_counts(root: Path, cpus: list[Path]) -> dict[str, int] | NotReadable:
    """How often cores and packages were slowed down because of heat since the system started."""
    found: dict[str, int] = {}
    for kind in ("core", "package"):
        name = f"thermal_throttle/{kind}_throttle_count"
        counts = [each for cpu in cpus if isinstance(each := number_of(cpu / name), int)]
        if counts:  # all cores of a package show its count
            found[kind] = sum(counts) if kind == "core" else max(counts)
    return found or NotReadable(f"no {root / _CPUS}/cpu*/thermal_throttle")


def _temperatures(root: Path) -> dict[str, float] | NotReadable:
    """Name -> temperature; of sensors of one name the highest."""
    found: list[tuple[str, float]] = []
    for zone in numbered(root / "sys/class/thermal", "thermal_zone"):
        kind, value = text_of(zone / "type"), number_of(zone / "temp")
        if isinstance(value, int):
            found.append((kind if isinstance(kind, str) else zone.name, value / 1000))
    for sensor in numbered(root / "sys/class/hwmon", "hwmon"):
        kind, value = text_of(sensor / "name"), number_of(sensor / "temp1_input")
        if isinstance(value, int) and isinstance(kind, str):
            found.append((kind, value / 1000))
    highest: dict[str, float] = {}
    for name, celsius in found:
        highest[name] = max(celsius, highest.get(name, celsius))
    return highest or NotReadable(f"no temperature in {root / 'sys/class/thermal'} or {root / 'sys/class/hwmon'}")


def _power_mode(root: Path) -> str | NotReadable:
    """The power mode of a Jetson, of macOS, or of the firmware of a PC."""
    if platform.system() == "Darwin":
        said = printed_by(["pmset", "-g"])
        modes = [] if isinstance(said, NotReadable) else re.findall(r"(lowpowermode|powermode)\s+(\d)", said)
        missing = said if isinstance(said, NotReadable) else NotReadable("pmset -g names no power mode")
        return ", ".join(f"{name} {value}" for name, value in modes) or missing
    said = printed_by(["nvpmodel", "-q"])
    if isinstance(said, str):
        return " ".join(said.split())
    profile = text_of(root / "sys/firmware/acpi/platform_profile")
    return profile if isinstance(profile, str) else NotReadable(f"{said.reason}, {profile.reason}")


def _power_source(root: Path) -> str | NotReadable:
    if platform.system() == "Darwin":
        said = printed_by(["pmset", "-g", "batt"])
        return said if isinstance(said, NotReadable) else said.partition("'")[2].partition("'")[0] or said
    found = sorted((root / "sys/class/power_supply").glob("*"))
    supplies = [each for each in found if text_of(each / "scope") != "Device"]  # else of a mouse or a keyboard
    batteries = [each for each in supplies if text_of(each / "type") == "Battery"]
    states = [text_of(each / "status") for each in batteries]
    if any(text_of(each / "online") in _ONLINE for each in supplies if each not in batteries):
        return "mains"
    if "Discharging" in states:
        return "battery"
    return NotReadable(f"no supply in {root / 'sys/class/power_supply'} says that it is on")
