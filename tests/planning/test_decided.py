"""What is decided among methods whose every latency is known, also where their predictions are wrong."""

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune import Schedule
from lightning_prune.planning.candidates import decided
from lightning_prune.planning.latency_model import ReductionOverhead
from lightning_prune.planning.single_block import MOVES

from .raced import DENSE_MS, DEPTH, Search, front, ratio, timing

FASTEST = Schedule([12, 0, 0, 0])


def fronts(*names, **kwargs):
    return [front(name, **kwargs)[0] for name in names]


@pytest.mark.parametrize("speedup", [1.2, 1.5, 2.0])
def test_right_predictions_are_timed_once(speedup):
    search = Search()
    best = decided(search, fronts("topk", "tome"), lp.LatencyBudget(speedup=speedup))
    assert len(search.runs) == 1
    assert 0.97 / speedup <= best.ratio() <= 1.005 / speedup


def uneven(method, schedule):
    """Every further block that reduces costs more than the last, and few tokens gain less than they should."""
    blocks, left = len(schedule.reducing), 17 - schedule.total_removed
    return ratio(schedule) + 0.015 * max(blocks - 1, 0) ** 2 + 0.04 * max(9 - left, 0) / 9


@pytest.mark.parametrize("speedup", [1.3, 1.5, 1.8])
def test_what_no_price_explains_is_led_into_the_budget_all_the_same(speedup):
    search = Search(uneven)
    (topk,) = fronts("topk")
    best = decided(search, [topk], lp.LatencyBudget(speedup=speedup))
    assert 2 <= len(search.runs) <= 1 + MOVES
    assert search.runs[0].ratios["topk"] > 1.005 / speedup
    assert 0.9 / speedup <= best.ratio() <= 1.005 / speedup
    assert best.ratio() == uneven("topk", best.entry.schedule)
    # None of its whole front, which is what there is to choose from, is better by more than a little.
    inside = [e for e in topk.everything() if uneven("topk", e.schedule) <= 1.005 / speedup]
    assert topk.accuracy(best.entry) >= max(1 - e.schedule.total_removed / 60 for e in inside) - 0.04


def test_nothing_is_timed_twice_and_the_number_of_runs_is_bounded():
    search = Search(lambda method, schedule: 0.99 - 1e-4 * schedule.total_removed)  # whatever is removed gains nothing
    best = decided(search, fronts("topk", "tome"), lp.LatencyBudget(speedup=1.5))
    seen = [(name, removed) for run in search.runs for name, removed in run.removed.items()]
    assert len(seen) == len(set(seen))
    assert len(search.runs) <= 1 + MOVES
    assert "longer than the latency budget, 1.5x" in best.reason
    assert best.ratio() == min(min(run.ratios.values()) for run in search.runs)


@pytest.mark.parametrize("slow", [1.05, 1.3, 3.0])
def test_how_slow_a_loser_is_does_not_change_who_wins(slow):
    truth = lambda method, schedule: slow if method == "topk" else ratio(schedule)  # noqa: E731
    proxy = lambda schedule: 1 - schedule.total_removed / 30  # noqa: E731
    alone = decided(Search(truth), fronts("tome", proxy=proxy), lp.Utility(0.5))
    beside = decided(Search(truth), fronts("tome", "topk", proxy=proxy), lp.Utility(0.5))
    assert alone.removes
    assert (beside.front.label, beside.entry.schedule) == ("tome", alone.entry.schedule)


def test_a_method_that_is_predicted_to_miss_by_little_is_tried_where_others_miss():
    limit = 1.02 * ratio(FASTEST)
    (tome,) = fronts("tome")
    (topk,) = fronts("topk", probed=[(FASTEST, timing(1.1 * ratio(FASTEST)))])
    assert topk.ratio(topk.entries[0]) > limit
    search = Search(lambda method, schedule: ratio(schedule) * (1.25 if method == "tome" else 1.0))
    best = decided(search, [topk, tome], lp.LatencyBudget(speedup=1 / limit))
    assert [set(run.removed) for run in search.runs] == [{"tome"}, {"topk"}]
    assert best.front is topk
    assert best.ratio() <= limit


def test_where_all_are_predicted_to_miss_by_little_their_fastest_are_tried():
    probed = [(FASTEST, timing(1.05 * ratio(FASTEST)))]
    budget = lp.LatencyBudget(speedup=1 / (1.01 * ratio(FASTEST)))
    best = decided(Search(), fronts("topk", "tome", probed=probed), budget)
    assert best.entry.schedule == FASTEST
    search = Search(lambda method, schedule: 1.04 * ratio(schedule))
    with pytest.raises(lp.ArgumentError, match=r"^topk: The latency budget, .*2\.6\dx, .* tome: The latency budget, "):
        decided(search, fronts("topk", "tome", probed=probed), budget)
    assert len(search.runs) == 1


def test_what_is_far_out_of_reach_is_not_timed():
    search = Search()
    with pytest.raises(lp.ArgumentError, match=r"topk: The latency budget, 50x cannot be reached: .* 2\.74x, and"):
        decided(search, fronts("topk"), lp.LatencyBudget(speedup=50))
    assert not search.runs


@pytest.mark.parametrize("slower", [0.5, 0.8, 1.5])
def test_milliseconds_are_those_of_now(slower):
    search = Search(slower=slower)
    search.compare({"dense": None})  # as pricing does
    best = decided(search, fronts("topk"), lp.LatencyBudget(ms=0.7 * DENSE_MS * slower))
    assert len(search.runs) == 2
    assert 0.66 <= best.ratio() <= 0.7035


def test_elsewhere_a_method_that_gains_nothing_does_not_stand_for_dense():
    (topk,) = fronts("topk")
    (weak,) = fronts("tome", most=0)
    for order in ([weak, topk], [topk, weak]):
        best = decided(Search(foreign=True), order, lp.LatencyBudget(speedup=1.01))
        assert best.front is topk
        assert best.removes
        assert best.pruned is None


@pytest.mark.parametrize("objective", [lp.Utility(0), lp.AccuracyBudget(0), lp.LatencyBudget(ms=1e6)], ids=str)
def test_where_dense_is_best_nothing_is_timed(objective):
    search = Search()
    best = decided(search, fronts("topk", "tome"), objective)
    assert not best.removes
    assert not search.runs


def test_no_proposal_is_made_when_time_is_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_prune.planning.candidates.time.perf_counter", lambda: now[0])

    class Slow(Search):
        def compare(self, variants):
            now[0] += 40.0
            return super().compare(variants)

    search = Slow(lambda method, schedule: 0.9)
    topk, asked = front("topk")
    best = decided(search, [topk], lp.LatencyBudget(speedup=1.5))
    assert len(search.runs) == 2  # 80 s are more than twice 30 s
    assert "is the best of the 2 that were timed" in best.reason
    assert {run.removed["topk"] for run in search.runs} <= set(asked)


def test_random_errors_of_predictions_never_break_a_budget():
    """Every schedule takes up to 8% more or less than its tokens and a price would say."""
    missed = worse = 0
    for seed in range(25):
        rng, noise = np.random.default_rng(seed), {}
        price = ReductionOverhead(reducing=rng.uniform(0, 3), after=rng.uniform(0, 0.5))

        def truth(method, schedule, rng=rng, noise=noise, price=price):
            key = method, schedule.removed
            noise.setdefault(key, 1 + 0.08 * (2 * rng.random() - 1))
            return ratio(schedule, price) * noise[key]

        speedup = float(rng.choice([1.2, 1.5, 1.9]))
        search, methods = Search(truth), fronts("topk", "tome")
        best = decided(search, methods, lp.LatencyBudget(speedup=speedup))
        inside = [
            1 - sum(run.removed[name]) / 60
            for run in search.runs
            for name, value in run.ratios.items()
            if value <= 1.005 / speedup
        ]
        missed += best.ratio() > 1.005 / speedup
        worse += bool(inside) and best.front.accuracy(best.entry) < max(inside) - 1e-9
        assert best.entry.schedule.depth == DEPTH
    assert missed == 0
    assert worse == 0
