"""What a search chooses among methods whose latencies are known, also if their predictions are wrong."""

from dataclasses import replace

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune import Schedule
from lightning_prune.planning.candidate_search import TUNING, CandidateSearch, Proposal, TimedCandidate, run_searches
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.latency_model import ReductionOverhead
from lightning_prune.profiling import Estimate, LatencyStats

from .simulated_search import DENSE_MS, DEPTH, Device, front, ratio, timing

FASTEST = Schedule([12, 0, 0, 0])


def fronts(*names, **kwargs):
    return [front(name, **kwargs)[0] for name in names]


@pytest.mark.parametrize("speedup", [1.2, 1.5, 2.0])
def test_right_predictions_are_timed_once(speedup):
    device = Device()
    best = device.search(fronts("topk", "tome"), lp.LatencyBudget(speedup=speedup))
    assert len(device.runs) == 1
    assert 0.97 / speedup <= best.candidate.latency_ratio <= 1.005 / speedup


def uneven(method, schedule):
    """Every further block that reduces costs more than the last, and few tokens gain less than they should."""
    blocks, left = len(schedule.reducing), 17 - schedule.total_removed
    return ratio(schedule) + 0.015 * max(blocks - 1, 0) ** 2 + 0.04 * max(9 - left, 0) / 9


@pytest.mark.parametrize("speedup", [1.3, 1.5, 1.8])
def test_latencies_that_no_overhead_explains_meet_the_budget_in_the_end(speedup):
    device = Device(uneven)
    (topk,) = fronts("topk")
    best = device.search([topk], lp.LatencyBudget(speedup=speedup))
    assert 2 <= len(device.runs) <= TUNING.max_runs
    assert device.runs[0].ratios["topk"] > 1.005 / speedup
    assert 0.9 / speedup <= best.candidate.latency_ratio <= 1.005 / speedup
    assert best.candidate.latency_ratio == uneven("topk", best.candidate.schedule)
    # No other candidate of the front is better by more than a little.
    inside = [c for c in topk.all_candidates() if uneven("topk", c.schedule) <= 1.005 / speedup]
    assert best.candidate.accuracy >= max(1 - c.schedule.total_removed / 60 for c in inside) - 0.04


def test_a_budget_on_the_tail_is_met_at_the_90th_percentile():
    """Latencies of pruned models vary more than those of dense, so that a second candidate is needed."""

    class Varying(Device):
        def time_candidates(self, candidates):
            dense, timings = super().time_candidates(candidates)
            varied = {key: replace(timing, p90_ms=1.5 * timing.milliseconds) for key, timing in timings.items()}
            return replace(dense, p90_ms=1.2 * dense.milliseconds), varied

    budget = DENSE_MS / 1.2
    median = Varying().search(fronts("topk", "tome"), lp.LatencyBudget(ms=budget)).candidate.timing
    found = Varying().search(fronts("topk", "tome"), lp.LatencyBudget(ms=budget, percentile=90))
    assert median.p90_ms > budget
    assert found.met
    assert found.candidate.timing.p90_ms <= 1.005 * budget
    missed = Varying().search(fronts("topk"), lp.LatencyBudget(ms=0.3 * DENSE_MS, percentile=90))
    assert not missed.met
    missed = Varying().search(fronts("topk"), lp.LatencyBudget(ms=0.4 * DENSE_MS, percentile=90))
    closest = missed.candidate.timing
    assert closest.milliseconds < 0.4 * DENSE_MS < closest.p90_ms
    assert f"{closest.p90_ms:.3g} ms at the 90th percentile" in missed.reason
    assert f"{closest.milliseconds:.3g} ms" not in missed.reason


def test_nothing_is_timed_twice_and_the_number_of_runs_is_bounded():
    device = Device(lambda method, schedule: 0.99 - 1e-4 * schedule.total_removed)  # whatever is removed gains nothing
    best = device.search(fronts("topk", "tome"), lp.LatencyBudget(speedup=1.5))
    seen = [(name, removed) for run in device.runs for name, removed in run.removed.items()]
    assert len(seen) == len(set(seen))
    assert len(device.runs) <= TUNING.max_runs
    assert not best.met
    assert "The latency budget, 1.5x is not met." in best.reason
    assert f"is the best of the {len(seen)} that were timed" in best.reason
    assert best.candidate.latency_ratio == min(min(run.ratios.values()) for run in device.runs)


@pytest.mark.parametrize("slow", [1.05, 1.3, 3.0])
def test_how_slow_a_loser_is_does_not_change_who_wins(slow):
    truth = lambda method, schedule: slow if method == "topk" else ratio(schedule)  # noqa: E731
    proxy = lambda schedule: 1 - schedule.total_removed / 30  # noqa: E731
    alone = Device(truth).search(fronts("tome", proxy=proxy), lp.Utility(0.5))
    together = Device(truth).search(fronts("tome", "topk", proxy=proxy), lp.Utility(0.5))
    assert not alone.candidate.is_dense
    assert together.candidate.key == alone.candidate.key


def test_a_method_that_is_predicted_to_miss_by_little_is_tried_where_others_miss():
    limit = 1.02 * ratio(FASTEST)
    (tome,) = fronts("tome")
    (topk,) = fronts("topk", probed=[(FASTEST, timing(1.1 * ratio(FASTEST)))])
    assert topk.fastest().ratio > limit
    device = Device(lambda method, schedule: ratio(schedule) * (1.25 if method == "tome" else 1.0))
    best = device.search([topk, tome], lp.LatencyBudget(speedup=1 / limit))
    assert [set(run.removed) for run in device.runs] == [{"tome"}, {"topk"}]
    assert best.met
    assert best.candidate.method == "topk"
    assert best.candidate.latency_ratio <= limit


def test_where_all_are_predicted_to_miss_by_little_their_fastest_are_tried():
    probed = [(FASTEST, timing(1.05 * ratio(FASTEST)))]
    budget = lp.LatencyBudget(speedup=1 / (1.01 * ratio(FASTEST)))
    best = Device().search(fronts("topk", "tome", probed=probed), budget)
    assert best.met
    assert best.candidate.schedule == FASTEST
    device = Device(lambda method, schedule: 1.04 * ratio(schedule))
    missed = device.search(fronts("topk", "tome", probed=probed), budget)
    assert not missed.met
    assert missed.candidate.schedule == FASTEST
    assert f"{1 / missed.candidate.latency_ratio:.2f}x is the best of the 2 that were timed" in missed.reason
    assert len(device.runs) == 1


def test_a_budget_far_out_of_reach_is_a_result_and_nothing_is_timed():
    device = Device()
    missed = device.search(fronts("topk", "tome"), lp.LatencyBudget(speedup=50))
    assert not device.runs
    assert not missed.met
    assert missed.candidate.is_dense
    for method in ("topk", "tome"):
        unmet = f"{method}: The latency budget, 50x cannot be reached: the fastest candidate is predicted to take"
        assert unmet in missed.reason
    assert "2.74x" in missed.reason


@pytest.mark.parametrize("slower", [0.5, 0.8, 1.5])
def test_milliseconds_are_those_of_now(slower):
    device = Device(slower=slower)
    best = device.search(fronts("topk"), lp.LatencyBudget(ms=0.7 * DENSE_MS * slower))
    assert len(device.runs) == 1
    assert 0.66 <= best.candidate.latency_ratio <= 0.7035


def test_without_timings_a_method_that_gains_nothing_does_not_stand_for_dense():
    (topk,) = fronts("topk")
    (weak,) = fronts("tome", most=0)
    for order in ([weak, topk], [topk, weak]):
        search = CandidateSearch(lp.LatencyBudget(speedup=1.01), order, DENSE_MS)
        search.next_candidates(float("inf"))
        best = search.result()
        assert best.candidate.method == "topk"
        assert not best.candidate.is_dense
        assert best.met
        assert best.candidate.timing is None


@pytest.mark.parametrize("objective", [lp.Utility(0), lp.AccuracyBudget(0), lp.LatencyBudget(ms=1e6)], ids=str)
def test_where_dense_is_best_nothing_is_timed(objective):
    device = Device()
    best = device.search(fronts("topk", "tome"), objective)
    assert best.candidate.is_dense
    assert best.met
    assert not device.runs


@pytest.mark.parametrize(("time_limit", "runs"), [(1.0, 1), (79.0, 1), (81.0, 2), (500.0, 3)])
def test_no_run_begins_that_would_end_too_late(time_limit, runs):
    """At least one run is made, and each further run is expected to take as long as the one before."""
    device = Device(lambda method, schedule: 0.9 - 1e-3 * schedule.total_removed, seconds=40.0)
    topk, asked = front("topk")
    best = device.search([topk], lp.LatencyBudget(speedup=1.5), time_limit)
    assert len(device.runs) == runs
    assert f"is the best of the {runs} that were timed" in best.reason
    assert {run.removed["topk"] for run in device.runs} <= {*asked, topk.fastest().schedule.removed}


def test_when_time_is_short_the_first_methods_propose():
    device = Device()
    methods = fronts("tome", "topk")
    slow = methods[0].propose
    methods[0].propose = lambda *given: (setattr(device, "now", device.now + 50.0), slow(*given))[1]
    best = device.search(methods, lp.AccuracyBudget(0.2), time_limit=40.0)
    assert best.met
    assert [set(run.removed) for run in device.runs] == [{"tome"}]
    assert best.candidate.method == "tome"
    assert best.candidate.timing is not None


def test_searches_for_several_objectives_share_their_runs():
    device = Device(uneven)
    methods = fronts("topk", "tome")
    objectives = [lp.LatencyBudget(speedup=1.3), lp.LatencyBudget(speedup=1.8), lp.AccuracyBudget(0.2)]
    searches = [CandidateSearch(objective, methods, DENSE_MS) for objective in objectives]
    run_searches(searches, device.time_candidates, 60.0, clock=device.clock)
    seen = [(name, removed) for run in device.runs for name, removed in run.removed.items()]
    assert len(seen) == len(set(seen))
    for search, objective in zip(searches, objectives, strict=True):
        best = search.result()
        alone = Device(uneven).search(fronts("topk", "tome"), objective)
        assert best.met
        ratios = np.array([best.candidate.latency_ratio, alone.candidate.latency_ratio, 1.0])
        accuracy = np.array([best.candidate.accuracy, alone.candidate.accuracy, 1.0])
        values = objective.score(ratios, accuracy)
        assert values[0] >= values[1] - 0.03


class Fixed:
    """A source that proposes one candidate after another, whatever was timed."""

    def __init__(self, label, *candidates):
        self.label, self.candidates = label, list(candidates)

    def propose(self, objective, dense_ms, deadline):
        return Proposal(self.candidates.pop(0) if len(self.candidates) > 1 else self.candidates[0])

    def fastest(self):
        return self.candidates[-1]

    def observe(self, candidate, timing):
        pass

    def accuracy(self, candidate):
        return Estimate(candidate.accuracy, 0.0)


@pytest.mark.parametrize("over", [1.003, 1.006, 1.04])
def test_a_near_miss_counts_as_met_by_half_a_percent(over):
    near = Candidate("near", None, Schedule([3, 0]), 0.66, accuracy=0.99)
    inside = Candidate("inside", None, Schedule([4, 0]), 0.66, accuracy=0.8)
    ratios = {"near": over / 1.5, "inside": 0.66}
    search = CandidateSearch(lp.LatencyBudget(speedup=1.5), [Fixed("near", near), Fixed("inside", inside)], 100.0)

    def time_candidates(candidates):
        timings = {c.key: LatencyStats(100 * ratios[c.method], 1, ratios[c.method], 0, 9) for c in candidates}
        return LatencyStats(100, 1, 1, 0, 9), timings

    run_searches([search], time_candidates, float("inf"))
    assert search.result().candidate.method == ("near" if over < 1.005 else "inside")


def test_random_errors_of_predictions_never_break_a_budget():
    """Every schedule takes up to 8% more or less than its tokens and an overhead predict."""
    missed = worse = 0
    for seed in range(25):
        rng, noise = np.random.default_rng(seed), {}
        overhead = ReductionOverhead(per_block=rng.uniform(0, 3), per_later_block=rng.uniform(0, 0.5))

        def truth(method, schedule, rng=rng, noise=noise, overhead=overhead):
            key = method, schedule.removed
            noise.setdefault(key, 1 + 0.08 * (2 * rng.random() - 1))
            return ratio(schedule, overhead) * noise[key]

        speedup = float(rng.choice([1.2, 1.5, 1.9]))
        device = Device(truth)
        best = device.search(fronts("topk", "tome"), lp.LatencyBudget(speedup=speedup))
        inside = [
            1 - sum(run.removed[name]) / 60
            for run in device.runs
            for name, value in run.ratios.items()
            if value <= 1.005 / speedup
        ]
        missed += not best.met or best.candidate.latency_ratio > 1.005 / speedup
        worse += bool(inside) and best.candidate.accuracy < max(inside) - 1e-9
        assert best.candidate.schedule.depth == DEPTH
    assert missed == 0
    assert worse == 0


def fixed(label, *accuracies, ratio=0.5):
    return Fixed(
        label, *(Candidate(label, None, Schedule([n, 0]), ratio, accuracy=a) for n, a in enumerate(accuracies, 1))
    )


def searched(objective, *sources, ratio=0.5, dense_ms=100.0):
    """The result of a search in which every candidate takes the same time, and the number of its runs."""
    search, runs = CandidateSearch(objective, sources, 100.0), []

    def time_candidates(candidates):
        runs.append([c.method for c in candidates])
        timings = {c.key: LatencyStats(ratio * dense_ms, 1, ratio, 0, 9) for c in candidates}
        return LatencyStats(dense_ms, 1, 1, 0, 9), timings

    run_searches([search], time_candidates, float("inf"))
    return search.result(), len(runs)


@pytest.mark.parametrize(("gain", "runs"), [(0.001, 1), (0.01, 2)])
def test_a_little_more_accuracy_is_not_worth_another_run(gain, runs):
    assert searched(lp.LatencyBudget(speedup=1.5), fixed("one", 0.9, 0.9 + gain))[1] == runs


def test_a_candidate_that_missed_the_budget_is_not_timed_again():
    best, runs = searched(lp.LatencyBudget(speedup=1.5), fixed("one", 0.9), ratio=0.7)
    assert (best.met, runs) == (False, 1)


def test_a_candidate_slower_than_dense_is_not_chosen():
    best, _ = searched(lp.AccuracyBudget(0.5), fixed("one", 0.9), ratio=1.05)
    assert best.candidate.is_dense
    assert best.met


def test_the_number_of_runs_is_bounded_if_every_proposal_promises_more():
    best, runs = searched(lp.LatencyBudget(speedup=1.5), fixed("one", *(0.5 + 0.01 * n for n in range(40))))
    assert runs == TUNING.max_runs
    assert best.candidate.accuracy == pytest.approx(0.5 + 0.01 * (runs - 1))


def test_a_budget_in_milliseconds_is_judged_by_the_dense_latency_of_now():
    best, _ = searched(lp.LatencyBudget(ms=60), fixed("one", 0.9), dense_ms=50.0)
    assert best.candidate.is_dense
    assert best.met


def test_a_source_without_gain_does_not_meet_the_budget_of_another():
    weak = Fixed("weak", Candidate("weak", None, Schedule([0, 0]), 1.0, accuracy=1.0))
    search = CandidateSearch(lp.LatencyBudget(speedup=1.5), [weak, fixed("one", 0.9)], 100.0)
    search.next_candidates(float("inf"))
    assert search.result().candidate.method == "one"


def test_of_timed_candidates_that_lose_nothing_the_slowest_is_chosen():
    fast, slow = fixed("fast", 1.02, ratio=0.3), fixed("slow", 1.0, ratio=0.6)
    for sources in ([fast, slow], [slow, fast]):
        search = CandidateSearch(lp.LatencyBudget(speedup=1.5), sources, 100.0)
        dense = LatencyStats(100.0, 0.1, 1.0, 0.001, 9)
        for source in sources:
            candidate = source.propose(search.objective, 100.0, 0.0).candidate
            own = LatencyStats(100 * candidate.ratio, 0.1, candidate.ratio, 0.001, 9)
            search.observe(TimedCandidate(replace(candidate, timing=own), source, own, dense))
        assert search.result().candidate.method == "slow"
