"""Noise, measured by a model that takes what a test says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune._utils.readings import NotReadable
from lightning_prune.profiling import noise_probe as module
from lightning_prune.profiling.noise_probe import NoiseReading, noise_of_machine, probe, threads_of

CPU = torch.device("cpu")
QUIET = NoiseReading("Abacus", 1, "wall", 10.0, 0.01, 0.0, 0.001, 0.002, 50)


class Timed(nn.Module):
    """Takes seconds of a clock that it drives, in turn."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.now, self.runs, self.seconds = 0.0, 0, seconds

    def forward(self, images: Tensor) -> Tensor:
        self.now += self.seconds[self.runs % len(self.seconds)]
        self.runs += 1
        return images

    def clock(self) -> float:
        return self.now


def test_a_machine_without_noise() -> None:
    model = Timed([0.01])
    reading = probe(CPU, model.clock, 1.0, model)
    assert reading.milliseconds == pytest.approx(10)
    assert (reading.difference, reading.run_spread) == (pytest.approx(0), pytest.approx(0))
    assert reading.smallest_gain < 1e-6
    assert 40 <= reading.rounds <= 60  # a second of 2 x 10 ms


def test_noise_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Timed((0.01 * (1 + 0.2 * torch.rand(997, generator=generator))).tolist())
    reading = probe(CPU, model.clock, 3.0, model)
    assert 0.03 < reading.run_spread < 0.07
    assert 0.002 < reading.smallest_gain < 0.05
    more = probe(CPU, model.clock, 30.0, model)
    assert more.error < reading.error / 2


@pytest.mark.parametrize(
    ("changed", "gain", "says"),
    [
        ({}, 0.00392, "0.4% and more"),
        ({"error": 0.05}, 0.098, "below 9.8%"),
        ({"difference": -0.3}, 0.3, "below 30.0%"),
        ({"rounds": 2}, 0.00392, "2 rounds"),
    ],
)
def test_the_verdict_is_of_the_figures(changed: dict[str, Any], gain: float, says: str) -> None:
    reading = replace(QUIET, **changed)
    assert reading.smallest_gain == pytest.approx(gain)
    assert says in reading.verdict
    assert reading.as_dict()["smallest_gain_percent"] == pytest.approx(100 * gain, abs=0.01)


def test_conditions_and_nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    with threads_of(2):
        found = noise_of_machine(0.01)
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {"1 thread, wall clock", "1 thread, cpu clock", "2 threads, wall clock"} <= found.keys()
    assert found["1 thread, cpu clock"]["rounds"] >= 3
    assert found["2 threads, wall clock"]["threads"] == 2


def test_a_condition_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(device: torch.device, clock: str, seconds: float) -> NoiseReading:
        if clock == "cpu" or device.type == "cuda":
            raise RuntimeError(f"no {clock} clock of {device.type}")
        return replace(QUIET, threads=torch.get_num_threads())

    monkeypatch.setattr(module, "probe", made)
    monkeypatch.setattr(module, "seconds_per_fault", lambda: 1 / 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with threads_of(2):
        found = noise_of_machine(0.01)
    assert [found[f"{name}, wall clock"]["threads"] for name in ("1 thread", "2 threads")] == [1, 2]
    assert found["1 thread, cpu clock"] == NotReadable("RuntimeError: no cpu clock of cpu")
    assert found["cuda, wall clock"] == NotReadable("RuntimeError: no wall clock of cuda")
    assert "ZeroDivisionError" in str(found["page_fault_us"])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: 1 / 0)
    assert "ZeroDivisionError" in str(noise_of_machine(0.01)["accelerator"])
