"""The best schedules of several methods against each other, under a clock that is known."""

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest

import lightning_prune as lp
from lightning_prune.planning.candidates import Candidate, best_timed
from lightning_prune.planning.results import FrontEntry
from lightning_prune.profiling import LatencyStats
from lightning_prune.reduction import ToMe

from .clocked import DEPTH, N, milliseconds, planned

pytestmark = pytest.mark.usefixtures("clock")


def test_the_best_method_by_the_measured_proxy_is_taken():
    made = planned(methods=["topk", "tome", "pomt", "random"], objective=lp.LatencyBudget(speedup=1.4))
    finalists = {}
    for entry in made.front:
        if (
            entry.accuracy is not None
            and entry.schedule.total_removed
            and milliseconds(entry.schedule) <= DEPTH * N / 1.4
        ):
            finalists[entry.method] = max(finalists.get(entry.method, 0.0), entry.accuracy)
    assert made.accuracy[made.tokens] >= max(finalists.values()) - 0.05


def test_what_cannot_be_reached_is_said_of_every_method():
    message = (
        r"topk: The latency budget, 50x cannot be reached: the fastest schedule is predicted to take 2\d\.\d ms, "
        r"3\.1\dx, and leaves 4 tokens\. tome: The latency budget, 50x cannot be reached: the fastest schedule is "
        r"predicted to take 2\d\.\d ms, 2\.4\dx, and leaves 4 tokens\.$"
    )
    with pytest.raises(lp.ArgumentError, match=message):
        planned(methods=["topk", "tome"], objective=lp.LatencyBudget(speedup=50))


class Slower:
    """Times schedules of some methods as if they took longer by a factor; keeps what was compared."""

    def __init__(self, monkeypatch, factors):
        self.factors, self.runs, self.real = factors, [], lp.compare_latency
        monkeypatch.setattr("lightning_prune.planning.multi_block.compare_latency", self)

    def __call__(self, model, batch, variants, **kwargs):
        found = self.real(model, batch, variants, **kwargs)
        if any(name.split()[-1] in ("early", "late") for name in variants):  # of the prices
            return found
        for name, factor in self.factors.items():
            if name in found:
                timing = found[name]
                found[name] = replace(timing, milliseconds=timing.milliseconds * factor, ratio=timing.ratio * factor)
        self.runs.append({name: timing.ratio for name, timing in found.items()})
        return found


def test_a_method_that_misses_the_budget_does_not_beat_one_that_keeps_to_it(monkeypatch):
    slower = Slower(monkeypatch, {"topk": 9.0})
    made = planned(methods=["tome", "topk"], objective=lp.LatencyBudget(speedup=1.5))
    assert made.method == "tome"
    assert made.pruned.ratio <= 1.005 / 1.5
    assert slower.runs[0]["topk"] > 1.005 / 1.5
    assert "longer than" not in made.reason


def test_a_method_that_is_moved_into_the_budget_is_taken_if_it_is_better_there(monkeypatch):
    Slower(monkeypatch, {"topk": 1.1})
    proxies = {"topk": 0.9, "tome": 0.4}
    measure = lambda self, reduction, schedule: proxies[reduction.name]  # noqa: E731
    monkeypatch.setattr("lightning_prune.planning.multi_block.BlockSearch.accuracy", measure)
    made = planned(methods=["tome", "topk"], objective=lp.LatencyBudget(speedup=1.5))
    assert made.method == "topk"
    assert made.pruned.ratio <= 1.005 / 1.5


@pytest.mark.parametrize("over", [1.003, 1.006, 1.04])
def test_a_near_miss_counts_as_inside_by_half_a_percent(over):
    entries = {"near": 0.99, "inside": 0.8}
    ratios = {"near": over / 1.5, "inside": 0.66}
    timed = []
    for name, accuracy in entries.items():
        front = SimpleNamespace(label=name, accuracy=lambda _, accuracy=accuracy: accuracy)
        entry = FrontEntry(name, lp.Schedule([3, 0]), 66.0, 0.1)
        pruned = LatencyStats(100 * ratios[name], 1, ratios[name], 0, 9)
        timed.append(Candidate(front, entry, name, LatencyStats(100, 1, 1, 0, 9), pruned))
    best = best_timed(timed, lp.LatencyBudget(speedup=1.5), 100.0)
    assert best.reason == ("near" if over < 1.005 else "inside")


def test_a_method_whose_blocks_do_not_add_up_is_led_into_the_budget(monkeypatch):
    """Each further reducing block makes all slower, which no price says: the more is timed, the better is predicted."""
    real = lp.compare_latency
    runs = []

    def slow(model, batch, variants, **kwargs):
        found = real(model, batch, variants, **kwargs)
        for name, variant in variants.items():
            if variant is not None:
                longer = 1.12 ** (len(variant[1].reducing) - 1)
                timing = found[name]
                found[name] = replace(timing, milliseconds=timing.milliseconds * longer, ratio=timing.ratio * longer)
        runs.append({name: timing.ratio for name, timing in found.items()})
        return found

    monkeypatch.setattr("lightning_prune.planning.multi_block.compare_latency", slow)
    made = planned(methods=["topk"], objective=lp.LatencyBudget(speedup=1.5))
    assert made.pruned.ratio <= 1.005 / 1.5
    assert "longer than" not in made.reason
    alone = [e for e in made.front if len(e.schedule.reducing) == 1 and milliseconds(e.schedule) <= DEPTH * N / 1.5]
    assert not alone or made.accuracy[made.tokens] >= max(e.accuracy or 0.0 for e in alone) - 0.002


def test_where_no_method_keeps_to_the_budget_the_nearest_is_taken_and_says_so(monkeypatch):
    slower = Slower(monkeypatch, {"topk": 2.5, "tome": 2.2})
    made = planned(methods=["tome", "topk"], objective=lp.LatencyBudget(speedup=2.0))
    timed = [(ratio, name) for run in slower.runs for name, ratio in run.items() if name != "dense"]
    assert (made.pruned.ratio, made.method) == min(timed)
    assert made.pruned.ratio > 0.75
    told = (
        rf"takes {100 * (2 * made.pruned.ratio - 1):.1f}% longer than the latency budget, 2x: 1\.\d\dx is the best of"
    )
    assert re.search(told, made.reason)


def test_dense_is_kept_where_nothing_that_was_timed_is_better(monkeypatch):
    Slower(monkeypatch, {"topk": 3.2})
    made = planned(methods=["topk"], objective=lp.Utility(0.5))
    assert made.removed == 0
    assert re.search(r"Timed beside dense \(topk 0\.\d\dx\), by utility, alpha 0.5 nothing is gained\.", made.reason)


NOISY = lp.LatencyProfile((5, 9, 13, 17), (5.0, 7.0, 9.0, 10.0), (20.0,) * 4, (9,) * 4, "random", 0, DEPTH)
FLAT = lp.LatencyProfile((5, 9, 13, 17), (9.85, 9.9, 9.95, 10.0), (0.001,) * 4, (9,) * 4, "random", 0, DEPTH)


@pytest.mark.parametrize("objective", [lp.Utility(), lp.LatencyBudget(speedup=1.5)], ids=str)
@pytest.mark.parametrize("device", [None, "Abacus"])
def test_a_noisy_curve_is_said_to_be_one(objective, device):
    profile = NOISY if device is None else replace(NOISY, context={"device": device})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = planned(methods=["topk"], profile=profile, objective=objective)
    assert made.removed == 0
    assert "too noisy to choose by" in made.reason
    assert ("The latency budget, 1.5x is not met" in made.reason) == isinstance(objective, lp.LatencyBudget)
    assert ("Nothing was timed here" in made.reason) == (device is not None)


def test_a_budget_that_a_flat_curve_misses_is_said_to_be_missed():
    made = planned(methods=["topk"], profile=FLAT, objective=lp.LatencyBudget(speedup=1.01))
    assert made.removed == 0
    assert "The curve is flat" in made.reason
    assert made.reason.endswith("The latency budget, 1.01x is not met.")


def test_two_configurations_of_a_method_are_two_methods(monkeypatch):
    slower = Slower(monkeypatch, {})
    methods = [ToMe(), ToMe(proportional_attention=False), "topk"]
    made = planned(methods=methods, objective=lp.LatencyBudget(speedup=1.3))
    names = {"tome (proportional_attention=True)", "tome (proportional_attention=False)", "topk"}
    assert {entry.method for entry in made.front} == names
    assert set(slower.runs[0]) == names | {"dense"}
    assert made.label in names
    assert made.method == made.label.split()[0]


def test_a_schedule_that_is_not_faster_in_the_end_is_not_deployed(monkeypatch):
    real = lp.compare_latency

    def slow(model, batch, variants, **kwargs):
        found = real(model, batch, variants, **kwargs)
        if len(variants) == 2:  # the finalist beside dense
            return dict.fromkeys(found, found["dense"])
        return found

    monkeypatch.setattr("lightning_prune.planning.multi_block.compare_latency", slow)
    made = planned(methods=["topk"])
    assert (made.removed, made.speedup, made.predicted_ratio) == (0, 1.0, 1.0)
    assert "nothing is gained" in made.reason
