"""The front of a method: what it proposes, and what it learns from timings."""

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune.planning.latency_model import ReductionOverhead

from .raced import DEPTH, N, front, latency, timing


def test_the_front_goes_from_dense_to_the_fastest():
    made, _ = front("topk")
    latencies = [entry.milliseconds for entry in made.everything()]
    assert latencies == sorted(latencies, reverse=True)
    assert made.dense.schedule.total_removed == 0
    assert made.everything()[0].accuracy == 1.0
    assert made.entries[0].milliseconds == latencies[-1]
    assert made.ratio(made.dense) == 1.0


def test_a_proxy_is_measured_once_and_estimated_elsewhere():
    made, asked = front("topk")
    low, high = made.entries[0], made.entries[-2]
    assert made.estimate(low) == 1.0  # nothing is known but dense
    assert made.accuracy(low) == made.accuracy(low) == 1 - low.schedule.total_removed / 60
    assert asked == [low.schedule.removed]
    straight = 1 - (1 - made.accuracy(low)) * high.cost / low.cost
    assert made.estimate(high) == pytest.approx(straight)
    assert made.accuracy(made.dense) == 1.0
    assert len(asked) == 1
    assert {e.schedule.removed: e.accuracy for e in made.everything()}[low.schedule.removed] == made.accuracy(low)


@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.2])
def test_the_choice_is_the_best_of_all(speedup):
    made, asked = front("topk")
    chosen, reason = made.choose(lp.LatencyBudget(speedup=speedup), DEPTH * N, 10.0)
    best = max(1 - e.schedule.total_removed / 60 for e in made.entries if made.ratio(e) <= 1.005 / speedup)
    assert chosen.schedule.removed in asked
    assert made.accuracy(chosen) == pytest.approx(best, abs=0.03)
    assert reason.startswith(f"Best by latency budget, {speedup:g}x: ")


@pytest.mark.parametrize("price", [ReductionOverhead(reducing=2.0), ReductionOverhead(tokens=3.0, after=0.5)])
def test_timings_teach_the_prices(price):
    truth = latency(price)
    unaware, _ = front("topk")
    told = [(e.schedule, timing(truth.predict(e.schedule) / truth.dense_ms)) for e in unaware.entries[:-1:4]]
    aware, _ = front("topk", probed=told)
    for entry in aware.everything():
        assert entry.milliseconds == pytest.approx(truth.predict(entry.schedule), rel=1e-3)
    few = lambda made: np.mean([len(e.schedule.reducing) for e in made.everything()])  # noqa: E731
    assert few(aware) < few(unaware)


def test_a_schedule_that_takes_longer_than_prices_can_explain_corrects_those_beside_it():
    made, _ = front("topk")
    chosen, _ = made.choose(lp.LatencyBudget(speedup=2.0), DEPTH * N, 10.0)
    before = made.ratio(chosen)
    for _ in range(4):
        chosen, _ = made.choose(lp.LatencyBudget(speedup=2.0), DEPTH * N, 10.0)
        tokens = (N, *chosen.schedule.tokens(N))
        actual = 0.05 + latency().predict(chosen.schedule) / (DEPTH * N) + 0.1 * (tokens[-1] / N)
        made.observe(chosen, timing(actual))
    assert actual == pytest.approx(0.5, abs=0.02)
    assert actual <= 1.005 / 2
    assert before == pytest.approx(0.5, abs=0.02)


def test_a_budget_that_is_out_of_reach_says_the_best_there_is():
    made, _ = front("topk")
    message = (
        r"The latency budget, 50x cannot be reached: the fastest schedule is predicted to take [\d.]+ ms, "
        r"[\d.]+x, and leaves 5 tokens\.$"
    )
    with pytest.raises(lp.ArgumentError, match=message):
        made.choose(lp.LatencyBudget(speedup=50), DEPTH * N, 10.0)


def test_where_every_schedule_costs_too_much_dense_is_chosen():
    made, _ = front("topk", proxy=lambda schedule: 0.1)
    chosen, reason = made.choose(lp.Utility(0.1), DEPTH * N, 10.0)
    assert chosen is made.dense
    assert reason == "Dense is best by the objective (utility, alpha 0.1): every faster schedule costs too much."


def test_where_reducing_costs_more_than_it_saves_nothing_is_faster():
    truth = latency(ReductionOverhead(reducing=100.0))
    unaware, asked = front("topk")
    told = [(e.schedule, timing(truth.predict(e.schedule) / truth.dense_ms)) for e in unaware.entries[:-1]]
    made, asked = front("topk", probed=told)
    chosen, reason = made.choose(lp.LatencyBudget(ms=100.0), DEPTH * N, 10.0)
    assert chosen is made.dense
    assert reason.startswith("No schedule is predicted to be faster than dense by more than 2%; the fastest by ")
    assert not asked


def test_out_of_time_one_choice_is_measured_all_the_same():
    made, asked = front("topk")
    chosen, _ = made.choose(lp.LatencyBudget(speedup=1.6), DEPTH * N, 0.0)
    assert made.ratio(chosen) <= 1.005 / 1.6
    assert len(asked) <= 5
