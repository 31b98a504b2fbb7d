"""Clocks, temperature and throttling of NVIDIA GPUs, as nvidia-smi says. It needs nothing but Python."""

from typing import Any

from lightning_prune._utils.readings import NotReadable, printed_by

_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "state": "pstate",
    "sm_mhz": "clocks.sm",
    "most_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "limit_watts": "power.limit",
    "busy_percent": "utilization.gpu",
    "persistence": "persistence_mode",
    "mig": "mig.mode.current",
}
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # before driver 535 only the second
# Bits of NVML's nvmlClocksEventReasons.
_BITS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap (software)",
    0x8: "slowdown (hardware)",
    0x10: "sync boost",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake (hardware)",
    0x100: "display clocks",
}


def read_gpus() -> list[dict[str, Any]] | NotReadable:
    """What nvidia-smi says of each GPU.

    Returns:
        For each GPU, name -> value, with the reasons for which its clocks are not the highest.
    """
    said: str | NotReadable = NotReadable("nvidia-smi was not asked")
    for reasons in _REASONS:
        fields = ",".join((*_FIELDS.values(), reasons))
        said = printed_by(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
        if isinstance(said, str):
            break
    if isinstance(said, NotReadable):
        return said
    return [_gpu([value.strip() for value in line.split(",")]) for line in said.splitlines() if line.strip()]


def throttle_reasons(mask: int) -> list[str]:
    """The reasons in a bit mask of NVML.

    Args:
        mask: Such as 0x1.

    Example:
        >>> from lightning_prune._utils.nvidia_state import throttle_reasons
        >>> throttle_reasons(0x24)
        ['power cap (software)', 'heat (software)']
    """
    unknown = mask & ~sum(_BITS)
    return [name for bit, name in _BITS.items() if mask & bit] + ([f"unknown bits {unknown:#x}"] if unknown else [])


def _gpu(values: list[str]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in zip(_FIELDS, values, strict=False):
        absent = value.startswith("[") or value in ("N/A", "")
        named[name] = NotReadable(f"nvidia-smi says {value}") if absent else _number(value)
    mask = values[len(_FIELDS)] if len(values) > len(_FIELDS) else ""
    try:
        named["slowed_by"] = throttle_reasons(int(mask, 16)) or ["nothing"]
    except ValueError:
        named["slowed_by"] = NotReadable(f"nvidia-smi says {mask!r}")
    return named


def _number(value: str) -> str | float | int:
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "." not in value else number
