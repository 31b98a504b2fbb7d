"""The merged front of `auto` at target speed-ups: its fast end is what was timed, not what was predicted."""

from types import SimpleNamespace

import pytest

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.comparison.request_reading import read_methods
from lightning_prune.comparison.target_search import auto_front, auto_source
from lightning_prune.patching import find_vision_transformer

from .simulated_search import DENSE_MS, DEPTH, Device, front, ratio

SLOW = 0.95


def measured(device, dominated=()):
    """What is known of tome, which is faster by its predictions, and of topk; of pomt-nearest nothing."""
    fronts = [front("tome")[0], front("topk", most=4)[0]]
    return SimpleNamespace(
        fronts=lambda methods, budgets: fronts,
        dense_ms=DENSE_MS,
        proxy_label="accuracy",
        limit=TimeLimit(100.0, device.clock),
        time_candidates=device.time_candidates,
        dominated=dict.fromkeys(dominated, (("tome",), 32)),
        not_finite={},
    )


def device_of(tome):
    return Device(lambda method, schedule: tome if method == "tome" and tome else ratio(schedule))


def found(device, speedup, dominated=()):
    budget = lp.LatencyBudget(speedup=speedup)
    transformer = find_vision_transformer(tiny_vit())
    return auto_front(["tome", "topk", "pomt-nearest"], measured(device, dominated), transformer, [budget])


def test_a_method_that_is_slower_than_predicted_is_not_the_fast_end():
    assert found(device_of(None), 50).candidates[-1].method == "tome"
    device = device_of(SLOW)
    fast = found(device, 50).candidates[-1]
    assert fast.method == "topk"
    assert fast.latency_ratio == pytest.approx(ratio(fast.schedule))
    assert set(device.runs[-1].removed) == {"tome", "topk"}


def test_nothing_more_is_timed_where_the_targets_are_met():
    device = device_of(None)
    front = found(device, 1.2)
    (start,) = front.start.values()
    assert front.candidates[start - 1].latency_ratio <= 1.005 / 1.2
    assert all(1 / min(run.ratios.values()) < 1.5 for run in device.runs)


@pytest.mark.parametrize(("dominated", "expected"), [((), ("pomt-nearest",)), (("pomt-nearest",), ())])
def test_the_end_says_what_was_not_searched(dominated, expected):
    made = found(device_of(None), 50, dominated)
    assert made.left_out == expected
    (request,) = read_methods(["auto"], None)[1:]
    source = auto_source(request, made, DEPTH)
    assert all(name in source.end for name in expected)
    assert "the method can remove" not in source.end


def test_what_is_proposed_for_a_target_has_a_measured_proxy():
    """The one that is next in line, too: a target may turn out to be missed when it is timed again."""
    device = device_of(None)
    state = measured(device)
    transformer = find_vision_transformer(tiny_vit())
    made = auto_front(["tome", "topk"], state, transformer, [lp.LatencyBudget(speedup=each) for each in (1.2, 1.8)])
    sources = {source.label: source for source in state.fronts(None, None)}
    for first in made.start.values():
        for candidate in made.candidates[first - 1 : first + 1]:
            assert sources[candidate.method].knows(candidate)
            assert candidate.accuracy == min(sources[candidate.method].accuracy(candidate).value, 1.0)
