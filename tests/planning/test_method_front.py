"""The front of a method: what it proposes, and how timings correct it."""

from itertools import pairwise

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune import LatencyProfile, Schedule
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.dynamic_program import Solution
from lightning_prune.planning.front_candidates import corrected_front, evenly_spaced, thinned
from lightning_prune.planning.latency_model import ReductionOverhead, token_levels
from lightning_prune.planning.method_front import TUNING
from lightning_prune.planning.reasons import dense_reason
from lightning_prune.profiling import Estimate
from lightning_prune.reduction import TopK

from .simulated_search import DENSE_MS, DEPTH, N, front, latency, timing

LATER = float("inf")


def test_the_front_goes_from_dense_to_the_fastest():
    topk, _ = front("topk")
    ratios = [candidate.ratio for candidate in topk.all_candidates()]
    assert ratios == sorted(ratios, reverse=True)
    assert topk.dense.is_dense
    assert topk.dense.ratio == 1.0
    assert topk.all_candidates()[0].accuracy == 1.0
    assert topk.fastest().ratio == ratios[-1]


def test_a_proxy_is_measured_once_and_estimated_elsewhere():
    topk, asked = front("topk", lambda schedule: Estimate(1 - schedule.total_removed / 60, 0.004))
    low, high = topk.candidates[0], topk.candidates[-2]
    assert topk.estimate(low) == (1.0, 0.0)  # only dense is known
    assert topk.accuracy(low) == topk.accuracy(low) == (1 - low.schedule.total_removed / 60, 0.004)
    assert asked == [low.schedule.removed]
    share = high.cost / low.cost
    linear = 1 - (1 - topk.accuracy(low).value) * share
    assert topk.estimate(high) == pytest.approx((linear, 0.004 * share))
    assert topk.accuracy(topk.dense) == (1.0, 0.0)
    assert len(asked) == 1
    assert {c.schedule.removed: c.estimate for c in topk.all_candidates()}[low.schedule.removed] == topk.accuracy(low)


@pytest.mark.parametrize("lost", [0.0, 0.3])
def test_beyond_what_is_known_a_proxy_falls_with_the_cost(lost):
    """Else the fastest of all would look as good as the slowest that is not known."""
    topk, _ = front("topk", lambda schedule: Estimate(1.01 - lost, 0.004))
    faster, known, slower = (topk.candidates[place] for place in (0, 3, -2))
    topk.accuracy(known)
    assert topk.estimate(faster).value == pytest.approx(1.01 - lost)
    slope = max(TUNING.min_fall_per_nat, (lost - 0.01) / known.cost)
    expected = 1.01 - lost - slope * (faster.cost - known.cost)
    assert topk.cautious_estimate(faster).value == pytest.approx(min(expected, 1.0))
    assert topk.cautious_estimate(known).value == min(1.01 - lost, 1.0)
    assert topk.cautious_estimate(slower).value == pytest.approx(min(topk.estimate(slower).value, 1.0))


@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.2])
def test_the_proposal_is_the_best_of_all(speedup):
    topk, asked = front("topk")
    proposal = topk.propose(lp.LatencyBudget(speedup=speedup), DENSE_MS, LATER)
    best = max(1 - c.schedule.total_removed / 60 for c in topk.candidates if c.ratio <= 1.005 / speedup)
    assert proposal.feasible
    assert proposal.candidate.schedule.removed in asked
    assert topk.accuracy(proposal.candidate).value == pytest.approx(best, abs=0.03)


@pytest.mark.parametrize(
    "overhead", [ReductionOverhead(per_block=2.0), ReductionOverhead(per_tokens=3.0, per_later_block=0.5)]
)
def test_timings_reveal_the_overhead(overhead):
    truth = latency(overhead)
    unaware, _ = front("topk")
    probed = [(c.schedule, timing(truth.predict(c.schedule) / truth.dense_ms)) for c in unaware.candidates[:-1:4]]
    aware, _ = front("topk", probed=probed)
    for candidate in aware.all_candidates():
        assert candidate.ratio * DENSE_MS == pytest.approx(truth.predict(candidate.schedule), rel=1e-3)
    blocks = [np.mean([len(c.schedule.reducing) for c in made.all_candidates()]) for made in (aware, unaware)]
    assert blocks[0] < blocks[1]


def test_a_schedule_slower_than_any_overhead_explains_corrects_its_neighbours():
    topk, _ = front("topk")
    budget = lp.LatencyBudget(speedup=2.0)
    before = topk.propose(budget, DENSE_MS, LATER).candidate.ratio
    for _ in range(4):
        chosen = topk.propose(budget, DENSE_MS, LATER).candidate
        tokens = chosen.schedule.tokens(N)
        actual = 0.05 + latency().predict(chosen.schedule) / DENSE_MS + 0.1 * (tokens[-1] / N)
        topk.observe(chosen, timing(actual))
    assert actual == pytest.approx(0.5, abs=0.02)
    assert actual <= 1.005 / 2
    assert before == pytest.approx(0.5, abs=0.02)
    timed = {c.schedule.removed: c.timing for c in topk.all_candidates(chosen)}
    assert timed[chosen.schedule.removed].ratio == actual


def test_an_infeasible_budget_is_a_proposal_with_the_fastest():
    topk, asked = front("topk")
    candidate, reason, feasible = topk.propose(lp.LatencyBudget(speedup=50), DENSE_MS, LATER)
    assert not feasible
    assert candidate is topk.fastest()
    assert reason.startswith("The latency budget, 50x cannot be reached: the fastest candidate is predicted to take")
    assert not asked


def test_dense_is_proposed_if_every_schedule_costs_too_much():
    topk, _ = front("topk", proxy=lambda schedule: 0.1)
    candidate, reason, _ = topk.propose(lp.Utility(0.1), DENSE_MS, LATER)
    assert candidate.is_dense
    assert reason == "Dense is best by the objective (utility, alpha 0.1): every faster schedule costs too much."


def test_dense_is_proposed_if_the_overhead_exceeds_what_is_saved():
    truth = latency(ReductionOverhead(per_block=100.0))
    unaware, _ = front("topk")
    probed = [(c.schedule, timing(truth.predict(c.schedule) / truth.dense_ms)) for c in unaware.candidates[:-1]]
    topk, asked = front("topk", probed=probed)
    candidate, reason, feasible = topk.propose(lp.LatencyBudget(ms=100.0), DENSE_MS, LATER)
    assert feasible
    assert candidate.is_dense
    assert "faster than dense by more than 2%" in reason
    assert not asked


def test_one_choice_is_measured_after_the_deadline():
    topk, asked = front("topk")
    proposal = topk.propose(lp.LatencyBudget(speedup=1.6), DENSE_MS, 0.0)
    assert proposal.candidate.ratio <= 1.005 / 1.6
    assert asked == [proposal.candidate.schedule.removed]


def by_cost(power=1.0, most=1.0):
    """A proxy that falls with the predicted cost, as it does where blocks add up: up to `most` at the largest."""
    costs = {c.schedule: c.cost for c in front("topk")[0].all_candidates()}
    return lambda schedule: 1 - most * (costs[schedule] / max(costs.values())) ** power


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("max_drop", [0.001, 0.01, 0.1, 0.5])
def test_under_an_accuracy_budget_few_proxies_find_what_all_of_them_find(power, max_drop):
    proxy = by_cost(power)
    topk, asked = front("topk", proxy)
    found = topk.propose(lp.AccuracyBudget(max_drop), DENSE_MS, LATER).candidate
    met = [c for c in topk.candidates if c.ratio < 0.98 and not c.is_dense and proxy(c.schedule) >= 1 - max_drop]
    assert found.ratio == pytest.approx(min((c.ratio for c in met), default=1.0), abs=TUNING.min_gain)
    assert len(asked) <= min(TUNING.first_proxies + TUNING.max_proxies, len(topk.candidates) / 2)


@pytest.mark.parametrize("power", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("max_drop", [0.05, 0.1, 0.2, 0.4])
def test_nothing_slower_than_what_another_method_meets_an_accuracy_budget_with_is_measured(max_drop, power):
    """A method that loses no less cannot win, and its slower candidates say nothing."""
    budget = lp.AccuracyBudget(max_drop)
    tome, _ = front("tome", by_cost())
    best = tome.propose(budget, DENSE_MS, LATER).candidate
    assert best.ratio < 1
    topk, asked = front("topk", by_cost(power))
    topk.others = [tome]
    assert topk.propose(budget, DENSE_MS, LATER).candidate.is_dense
    ratios = {c.schedule.removed: c.ratio for c in topk.candidates}
    assert all(ratios[removed] < best.ratio for removed in asked)
    assert len(asked) <= TUNING.max_misses


@pytest.mark.parametrize(("power", "better", "max_drop"), [(1.0, 1.3, 0.2), (1.0, 1.3, 0.4), (0.5, 1.0, 0.2)])
def test_a_method_that_is_better_is_found_behind_one_that_is_known(power, better, max_drop):
    budget = lp.AccuracyBudget(max_drop)
    tome, _ = front("tome", by_cost(power))
    slower = tome.propose(budget, DENSE_MS, LATER).candidate
    topk, _ = front("topk", by_cost(better))
    topk.others = [tome]
    found = topk.propose(budget, DENSE_MS, LATER).candidate
    met = [c.ratio for c in topk.candidates if not c.is_dense and by_cost(better)(c.schedule) >= 1 - max_drop]
    assert found.ratio == pytest.approx(min(met), abs=TUNING.min_gain)
    assert found.ratio < slower.ratio


@pytest.mark.parametrize("speedup", [1.2, 2.0])
def test_within_a_latency_budget_the_cheapest_is_measured_and_no_other(speedup):
    topk, asked = front("topk", by_cost())
    found = topk.propose(lp.LatencyBudget(speedup=speedup), DENSE_MS, LATER).candidate
    within = [c for c in topk.candidates if c.ratio <= 1.005 / speedup]
    assert found.cost == min(c.cost for c in within)
    assert asked == [found.schedule.removed]


def test_a_method_that_loses_nothing_within_a_latency_budget_is_not_beaten():
    tome, _ = front("tome", lambda schedule: 1.0)
    topk, asked = front("topk", lambda schedule: 1.0)
    topk.others = [tome]
    budget = lp.LatencyBudget(speedup=1.5)
    assert tome.propose(budget, DENSE_MS, LATER).feasible
    assert topk.propose(budget, DENSE_MS, LATER) is None
    assert not asked


def test_a_utility_measures_only_what_may_be_best():
    for alpha in (0.2, 0.5, 0.8):
        topk, asked = front("topk", by_cost())
        found = topk.propose(lp.Utility(alpha), DENSE_MS, LATER).candidate
        value = lambda c, alpha=alpha: alpha * (1 - c.ratio) + (1 - alpha) * by_cost()(c.schedule)  # noqa: E731
        assert value(found) == pytest.approx(max(map(value, topk.candidates)), abs=0.01)
        assert len(asked) <= TUNING.first_proxies + TUNING.max_proxies


SOLUTIONS = [
    Solution(100.0, 0.0, (17, 17)),
    Solution(80.0, 0.1, (17, 9)),
    Solution(60.0, 0.2, (13, 9)),
    Solution(50.0, 0.4, (9, 9)),
]


def corrected(predicted, measured):
    return corrected_front("topk", TopK(), SOLUTIONS, 17, predicted, measured)


def ratios(candidates):
    return [round(100 * candidate.ratio, 6) for candidate in candidates]


def test_solutions_become_schedules():
    candidates = corrected([], [])
    assert [c.schedule.removed for c in candidates] == [(0, 0), (0, 8), (4, 4), (8, 0)]
    assert ratios(candidates) == [100, 80, 60, 50]
    assert {c.method for c in candidates} == {"topk"}


def test_a_timing_corrects_its_neighbours_and_less_those_near_dense():
    assert ratios(corrected([0.6], [0.66])) == pytest.approx([100, 80 * 1.05, 66, 55])
    # Linear between two timings, in whatever order they come.
    assert ratios(corrected([0.8, 0.5], [0.8, 0.56])) == pytest.approx([100, 80, 60 * (1 + 0.12 * 2 / 3), 56])


def test_a_candidate_slower_than_a_cheaper_one_is_dropped():
    assert ratios(corrected([0.8, 0.6, 0.5], [0.8, 0.81, 0.5])) == [100, 80, 50]


def candidate(ratio, cost, removed):
    return Candidate("topk", TopK(), Schedule(removed), ratio, cost)


def test_of_equally_fast_candidates_the_cheapest_and_the_fastest_of_all_are_kept():
    dense = candidate(1.0, 0.0, (0, 0))
    front = [dense, candidate(0.603, 0.01, (0, 8)), candidate(0.602, 0.5, (8, 0)), candidate(0.6005, 5.0, (12, 0))]
    assert [(c.ratio, c.cost) for c in thinned(front)] == [(0.6005, 5.0), (0.603, 0.01), (1.0, 0.0)]
    assert thinned([dense]) == [dense]


def test_dense_stays_if_another_schedule_costs_nothing():
    solutions = [Solution(100.0, 0.0, (17,)), Solution(90.0, 0.0, (16,))]
    assert ratios(corrected_front("topk", TopK(), solutions, 17, [], [])) == [100, 90]


def test_a_few_at_even_distances():
    assert evenly_spaced(range(10), 4) == [0, 3, 6, 9]
    assert evenly_spaced(range(3), 4) == [0, 1, 2]
    assert TUNING.first_proxies == 4


def curve(latency, spread=0.001):
    tokens = tuple(sorted(latency))
    milliseconds = tuple(latency[count] for count in tokens)
    return LatencyProfile(tokens, milliseconds, (spread,) * len(tokens), (9,) * len(tokens), "random", 0, DEPTH)


def test_few_counts_are_all_searched():
    assert token_levels(curve({20: 2.0, 60: 5.0, 100: 10.0})) == [20, 60, 100]


def test_of_many_counts_the_lower_edges_of_cliffs_are_searched():
    stairs = {count: 0.01 * count + 2.0 * sum(count > edge for edge in (33, 77, 120)) for count in range(2, 198)}
    levels = token_levels(curve(stairs))
    assert len(levels) == 40
    assert {2, 33, 77, 120, 197} <= set(levels)
    assert max(b - a for a, b in pairwise(levels)) <= 8


def test_counts_that_a_method_needs_are_searched_between_those_of_the_curve():
    found = curve({20: 2.0, 60: 5.0, 100: 10.0})
    assert token_levels(found, [10, 20, 37, 82, 100]) == [20, 37, 60, 82, 100]
    many = token_levels(found, range(30, 100))  # more than are searched: at even distances, the smallest, too
    assert len(many) == 3 + 16
    assert {20, 30, 60, 99, 100} < {*many}
    assert max(after - before for before, after in pairwise(many[1:])) <= 6
    levels = token_levels(curve({count: 0.01 * count for count in range(2, 198)}), [count + 0.5 for count in range(9)])
    assert len(levels) == 40
    assert {count + 0.5 for count in range(2, 9)} < {*levels}


FLAT, NOISY = curve({20: 9.9, 100: 10.0}), curve({20: 5.0, 100: 10.0}, spread=20.0)


@pytest.mark.parametrize(("profile", "reason"), [(FLAT, "The curve is flat"), (NOISY, "too noisy to choose by")])
def test_a_device_that_gains_nothing_is_not_searched(profile, reason):
    assert token_levels(profile) == [100]
    assert reason in dense_reason(profile)
    assert dense_reason(curve({20: 2.0, 60: 5.0, 100: 10.0})) is None


def test_a_confidence_takes_a_slower_candidate_whose_lower_bound_meets_the_budget():
    noisy = lambda schedule: Estimate(1 - schedule.total_removed / 600, schedule.total_removed / 600)  # noqa: E731
    removed = {}
    for confidence in (0.5, 0.95):
        topk, _ = front("topk", noisy)
        chosen = topk.propose(lp.AccuracyBudget(0.01, confidence), DENSE_MS, LATER).candidate
        removed[confidence] = chosen.schedule.total_removed
    assert 0.01 >= removed[0.5] / 600 > removed[0.95] / 600 > 0
    assert removed[0.95] / 600 * (1 + 1.645) <= 0.01
