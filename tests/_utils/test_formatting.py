import math
from typing import Any

import pytest

from lightning_prune._utils.formatting import context_line, milliseconds, percent, points, speedup


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_unknown_values_are_a_dash(unknown: float | None) -> None:
    assert [write(unknown) for write in (percent, points, milliseconds, speedup)] == ["-"] * 4


def test_shares_and_their_differences() -> None:
    assert (percent(0.931451), percent(0.931451, 1), percent(1)) == ("93.15%", "93.1%", "100.00%")
    assert (points(0.0125), points(-0.0125), points(-0.000049)) == ("+1.25", "-1.25", "+0.00")


@pytest.mark.parametrize(
    ("latency", "text"), [(0.456, "0.46"), (99.99, "99.99"), (141.34, "141.3"), (999.94, "999.9"), (1658.7, "1659")]
)
def test_latencies_have_at_least_three_digits(latency: float, text: str) -> None:
    assert milliseconds(latency) == text


@pytest.mark.parametrize(
    ("context", "line"),
    [
        ({}, ""),
        ({"device": "CPU", "threads": 2}, "CPU"),
        ({"device": "CPU", "device_type": "cpu", "threads": 2, "batch_size": 1}, "CPU, 2 threads, batch 1"),
        ({"device": "GPU", "device_type": "cuda", "threads": 2, "precision": "bf16"}, "GPU, bf16"),
        ({"device": "GPU", "compiled": True, "batch_size": None}, "GPU, compiled"),
    ],
)
def test_context_line_has_the_known_entries(context: dict[str, Any], line: str) -> None:
    assert context_line(context) == line
