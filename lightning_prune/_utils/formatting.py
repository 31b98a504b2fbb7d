"""Formats shares, differences of shares, latencies, speed-ups and measurement contexts as text."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

_UNKNOWN = "-"


def percent(share: float | None, digits: int = 2) -> str:
    """A share as a percentage; a dash if it is unknown.

    Example:
        >>> percent(0.931), percent(0.9314, digits=1), percent(None)
        ('93.10%', '93.1%', '-')
    """
    return _UNKNOWN if share is None or not isfinite(share) else f"{100 * share:.{digits}f}%"


def points(change: float | None) -> str:
    """A difference of two shares in percentage points, signed; a dash if it is unknown.

    Example:
        >>> points(0.012), points(-0.0055), points(0.0)
        ('+1.20', '-0.55', '+0.00')
    """
    if change is None or not isfinite(change):
        return _UNKNOWN
    return f"{100 * change:+.2f}".replace("-0.00", "+0.00")  # zero has no sign


def milliseconds(latency: float | None) -> str:
    """A latency in milliseconds, without the unit, about five characters wide; a dash if it is unknown.

    Example:
        >>> milliseconds(7.853), milliseconds(141.34), milliseconds(1234.5), milliseconds(None)
        ('7.85', '141.3', '1234', '-')
    """
    if latency is None or not isfinite(latency):
        return _UNKNOWN
    digits = 2 if latency < 100 else 1 if latency < 1000 else 0
    return f"{latency:.{digits}f}"


def with_tail(median: float, p90: float | None) -> str:
    """A latency in a sentence, with its 90th percentile after the median where it is known.

    Example:
        >>> with_tail(12.345, 14.0), with_tail(12.345, None)
        ('12.35 ms (p90 14.00)', '12.35 ms')
    """
    return f"{median:.2f} ms" + ("" if p90 is None else f" (p90 {p90:.2f})")


def three_digits(value: float) -> str:
    """A value with three significant digits in a sentence; large ones without an exponent.

    Example:
        >>> three_digits(0.12345), three_digits(5.0), three_digits(1284.6)
        ('0.123', '5', '1280')
    """
    return f"{float(f'{value:.3g}'):.12g}"


def figure(value: float) -> str:
    """A value of any size in a table: whole numbers as they are, others with four significant digits or more.

    Example:
        >>> figure(0.6899999976158142), figure(402.1810302734375), figure(20123.4), figure(50000.0)
        ('0.69', '402.2', '20123', '50000')
    """
    if not isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 or value == round(value) else f"{float(f'{value:.4g}'):.12g}"


def speedup(ratio: float | None) -> str:
    """A speed-up over dense; a dash if it is unknown.

    Example:
        >>> speedup(1.5), speedup(None)
        ('1.50x', '-')
    """
    return _UNKNOWN if ratio is None or not isfinite(ratio) else f"{ratio:.2f}x"


def timed_quantity(context: Mapping[str, Any]) -> str:
    """What the milliseconds of a context are: `"latency"`, or `"CPU time"` where the clock was that of the process.

    Args:
        context: The context of a profile or a comparison.

    Example:
        >>> timed_quantity({"clock": "cpu"}), timed_quantity({})
        ('CPU time', 'latency')
    """
    return "CPU time" if context.get("clock") == "cpu" else "latency"


def model_title(context: Mapping[str, Any]) -> str:
    """What a table or a plot is of: the name of the model where its library has one, else its class.

    Args:
        context: The context of a profile or a comparison.

    Example:
        >>> model_title({"model": "VisionTransformer", "model_name": "deit_small_patch16_224"})
        'deit_small_patch16_224'
    """
    return str(context.get("model_name") or context.get("model") or "model")


def context_line(context: Mapping[str, Any]) -> str:
    """A measurement context on one line; entries that are missing are left out.

    Args:
        context: The context of a profile or a comparison.

    Example:
        >>> context_line({"device": "AMD EPYC", "device_type": "cpu", "threads": 2, "batch_size": 16})
        'AMD EPYC, 2 threads, batch 16'
        >>> context_line({"device": "NVIDIA H200", "device_type": "cuda", "threads": 8, "precision": "bf16-mixed"})
        'NVIDIA H200, bf16-mixed'
    """
    threads, batch, runtime = (context.get(key) for key in ("threads", "batch_size", "runtime"))
    parts = [
        context.get("device"),
        f"{threads} thread{'s' * (threads != 1)}" if threads and context.get("device_type") == "cpu" else None,
        f"batch {batch}" if batch else None,
        context.get("precision"),
        "compiled" if context.get("compiled") else runtime if runtime != "torch" else None,
        "CPU time" if context.get("clock") == "cpu" else None,
    ]
    return ", ".join(str(part) for part in parts if part)
