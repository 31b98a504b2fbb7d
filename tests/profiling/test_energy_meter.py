"""A meter whose joules are known exactly: it draws a fixed power at rest and more at work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.profiling import energy_meter
from lightning_prune.profiling.energy_meter import EnergyReading, measure_energy

IDLE, BUSY = 10.0, 50.0


class Machine:
    """A device with a counter and a clock; a run takes as long as `takes` says, one after another."""

    name = "fake"

    def __init__(self, takes: Callable[[int], float] = lambda run: 0.25, resolution: float = 0.02) -> None:
        self.takes, self.resolution = takes, resolution
        self.now = self.used = 0.0
        self.runs = 0
        self.events: list[str] = []
        self.began: dict[str, float] = {}

    def begin(self, window: str) -> None:
        self.events.append("begin")
        self.began[window] = self.used

    def end(self, window: str) -> float:
        self.events.append("end")
        return self.used - self.began.pop(window)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.events.append("sleep")
        self.now += seconds
        self.used += IDLE * seconds

    def run(self) -> None:
        self.events.append("run")
        seconds = self.takes(self.runs)
        self.runs += 1
        self.now += seconds
        self.used += BUSY * seconds

    def measure(self, images: int = 8, **more: Any) -> EnergyReading:
        options: dict[str, Any] = {"counter": self, "clock": self.clock, "sleep": self.sleep} | more
        return measure_energy(self.run, images, "cpu", **options)


def test_energy_of_a_constant_power_is_exact() -> None:
    """Four runs of a quarter of a second fill a window."""
    machine = Machine()
    found = machine.measure(images=8, windows=3)
    assert found.joules_per_image == pytest.approx(BUSY * 0.25 / 8)
    assert (found.watts, found.idle_watts) == pytest.approx((BUSY, IDLE))
    assert (found.images, found.windows, found.source) == (8 * 12, 3, "fake")
    assert found.seconds == pytest.approx(3.0)
    assert found.spread == 0.0


def test_idle_then_one_run_that_does_not_count_then_windows() -> None:
    machine = Machine(lambda run: 100.0 if run == 0 else 0.6)
    found = machine.measure(windows=2)
    window = ["begin", "run", "run", "end"]
    assert machine.events == ["begin", "sleep", "end", "run", *window, *window]
    assert found.seconds == pytest.approx(4 * 0.6)


@pytest.mark.parametrize("images", [1, 16])
def test_against_a_plain_loop(images: int) -> None:
    takes = [0.3, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.35, 1.5, 0.2] + [0.4] * 20
    found = Machine(lambda run: takes[run]).measure(images=images, windows=4, min_seconds=1.2)
    rest, joules, seconds, runs, each = takes[1:], 0.0, 0.0, 0, []
    for _ in range(4):
        lasted, count = 0.0, 0
        while lasted < 1.2:
            lasted, count = lasted + rest.pop(0), count + 1
        joules, seconds, runs = joules + BUSY * lasted, seconds + lasted, runs + count
        each.append(BUSY * lasted / (count * images))
    quartiles = torch.tensor(each, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert found.images == runs * images
    assert found.joules_per_image == pytest.approx(joules / (runs * images))
    assert found.watts == pytest.approx(joules / seconds)
    assert found.spread == pytest.approx(float(quartiles[1] - quartiles[0]) / 2)


def test_one_run_longer_than_a_window() -> None:
    found = Machine(lambda run: 4.0).measure(images=2, windows=1)
    assert (found.images, found.seconds) == (2, 4.0)


def test_device_is_synchronised_around_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda run: 1.0)
    monkeypatch.setattr(energy_meter, "synchronize", lambda device: machine.events.append(device.type))
    measure_energy(machine.run, 1, torch.device("xpu"), machine, windows=1, clock=machine.clock, sleep=machine.sleep)
    idle, window = ["xpu", "begin", "sleep", "xpu", "end"], ["xpu", "begin", "run", "xpu", "end"]
    assert machine.events == ["xpu", *idle, "run", *window]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_seconds": 0.5}, r"`min_seconds` must be at least 1 seconds .*got 0\.5\.$"),
        ({"idle_seconds": 0.999}, r"`idle_seconds` must be at least 1 seconds .*got 0\.999\.$"),
        ({"min_seconds": float("nan")}, r"`min_seconds` must .*got nan\.$"),
        ({"min_seconds": float("inf")}, r"`min_seconds` must .*got inf\.$"),
        ({"images": 0}, r"`images` must .*got 0\.$"),
        ({"windows": 0}, r"`windows` must .*got 0\.$"),
    ],
)
def test_windows_that_are_too_short_are_refused(options: dict[str, Any], message: str) -> None:
    machine = Machine()
    with pytest.raises(ArgumentError, match=message):
        machine.measure(**options)
    assert not machine.events


def test_a_slow_counter_wants_longer_windows() -> None:
    with pytest.raises(ArgumentError, match=r"`min_seconds` must be at least 5 seconds .*got 1\.0\.$"):
        Machine(resolution=0.5).measure()
    assert Machine(resolution=0.5).measure(min_seconds=5, idle_seconds=5).watts == pytest.approx(BUSY)


def test_a_counter_that_stands_still() -> None:
    machine = Machine()
    vars(machine)["end"] = lambda window: 0.0
    with pytest.raises(DataError, match=r"fake must rise, got 0 J in 1 s"):
        machine.measure()


def test_device_without_a_counter_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`counter` must .*got None: n/a .*\(there is none"):
        measure_energy(lambda: None, 1, "meta")
