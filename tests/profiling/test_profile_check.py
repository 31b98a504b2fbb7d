"""Whether a profile still holds: real changes are found, and the noise of a machine is no change."""

from dataclasses import replace

import numpy as np
import pytest

from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.profiling import (
    InterleavedTimer,
    LatencyProfile,
    LatencyStats,
    SimulatedClock,
    SimulatedDevice,
    profile_check,
)
from lightning_prune.profiling.count_search import profile_builder, search_counts
from lightning_prune.profiling.profile_check import TUNING, dense_change, is_changed

DENSE_S = 0.05


def clocked(device, speed=1.0):
    """A timer of a device on which a token takes the same everywhere, and its clock."""
    clock, current = SimulatedClock(device), [197]
    run = lambda: clock.spend(speed * DENSE_S * current[0] / 197)  # noqa: E731
    return InterleavedTimer(lambda n: current.__setitem__(0, n), run, lambda: None, 197, clock=clock), clock


def measured(device):
    timer, _ = clocked(device)
    return search_counts(timer, profile_builder("random", 0, 12, "deployed"), None, 20, 197, 18.0, lambda: None)


def looks(device, speed):
    """The two looks at a later moment, as `dense_change` takes them."""
    timer, clock = clocked(device, speed)
    clock.now = 60 * np.random.default_rng(device.seed).random()
    for rounds in TUNING.looks:
        fresh = InterleavedTimer(timer.prepare, timer.run, lambda: None, 197, clock=clock)
        fresh.measure([], rounds)
        yield fresh.result(197)


def alarms(profile, device, speed, tries=100):
    found = [all(is_changed(profile, now) for now in looks(replace(device, seed=seed), speed)) for seed in range(tries)]
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("noise", "spikes", "drift", "change"),
    [(0.0, 0.0, 0.0, 1.06), (0.03, 0.02, 0.0, 1.2), (0.1, 0.05, 0.05, 1.4), (0.2, 0.1, 0.1, 1.7)],
)
def test_noise_is_no_change_and_a_change_is_found(noise, spikes, drift, change):
    device = SimulatedDevice(noise=noise, spikes=spikes, drift=drift, seed=1)
    profile = measured(device)
    assert alarms(profile, device, 1.0) <= 0.01
    assert alarms(profile, device, 1.02) <= 0.03
    assert alarms(profile, device, change) >= 0.9
    assert alarms(profile, device, 1 / change) >= (0.9 if noise < 0.2 else 0.4)


def test_what_differs_by_more_than_half_is_another_machine_however_noisy_it_is():
    wild = LatencyProfile((9, 17), (1.0, 2.0), (0.9, 1.8), (3, 3), "random", 0, 4, drift=0.9)
    assert not is_changed(wild, LatencyStats(2.9, 1.0, 1.0, 0.0, 5))
    assert is_changed(wild, LatencyStats(3.1, 1.0, 1.0, 0.0, 5))
    assert is_changed(wild, LatencyStats(1.3, 1.0, 1.0, 0.0, 5))


def test_a_profile_without_drift_allows_for_some():
    quiet = LatencyProfile((9, 17), (1.0, 2.0), (0.001, 0.001), (31, 31), "random", 0, 4, drift=0.0)
    now = LatencyStats(2.0 * 1.07, 0.001, 1.0, 0.0, 5)
    assert is_changed(quiet, now)
    assert not is_changed(replace(quiet, drift=None), now)


@pytest.mark.parametrize(("seen", "changed"), [([3.0, 2.0], False), ([3.0, 3.1], True), ([2.01], False)])
def test_a_change_that_passes_is_none(monkeypatch, seen, changed):
    """A second look at more runs decides."""
    asked = []

    def compare_latency(*_, rounds, time_limit, **__):
        asked.append((rounds, time_limit))
        return {"dense": LatencyStats(seen[len(asked) - 1], 0.02, 1.0, 0.0, rounds)}

    monkeypatch.setattr(profile_check, "compare_latency", compare_latency)
    known = LatencyProfile((9, 17), (1.0, 2.0), (0.01, 0.01), (31, 31), "random", 0, 4, drift=0.0)
    options = {"time_limit": 20.0, "module_path": None, "clock": lambda: 0.0}
    found = dense_change(known, tiny_vit(), noise_images(1), **options)
    assert (found is not None) == changed
    assert asked == [(5, 1.0), (15, 1.0)][: len(seen)]
    if changed:
        assert str(found) == "2 (± 0.01) ms by the profile, 3.1 (± 0.02) ms now"
