"""Schedules of several methods: their latency against loops, and when they are proposed."""

from itertools import pairwise

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune import Schedule
from lightning_prune.planning.candidate_search import CandidateSearch
from lightning_prune.planning.latency_model import NO_OVERHEAD, ReductionOverhead
from lightning_prune.planning.method_front import MethodFront
from lightning_prune.planning.mixed_front import MixedFront, combinable
from lightning_prune.planning.mixed_latency import MixedLatency, TimedSchedule, fit_overheads
from lightning_prune.profiling import DENSE_ACCURACY, Estimate
from lightning_prune.reduction import TopK, resolve

from .simulated_search import DENSE_MS, LEVELS, Device, N, costs, latency, timing

CHEAP = ReductionOverhead(per_block=0.5, per_tokens=0.2)
DEAR = ReductionOverhead(per_block=2.0, per_tokens=1.0, per_later_block=0.7)
SCHEDULES = [
    (Schedule([0, 0, 0, 0]), (None,) * 4),
    (Schedule([3, 2, 0, 4]), (0, 1, None, 0)),
    (Schedule([3, 2, 0, 4]), (1, 0, None, 1)),
    (Schedule([0, 5, 4, 0]), (None, 0, 0, None)),
    (Schedule([0, 5, 4, 0]), (None, 1, 1, None)),
    (Schedule([1, 1, 1, 1]), (0, 0, 0, 1)),
    (Schedule([0, 0, 6, 0]), (None, None, 1, None)),
]


def mixed(*overheads, weighs=(False, True)):
    return MixedLatency(tuple(map(latency, overheads)), weighs)


@pytest.mark.parametrize(("schedule", "methods"), SCHEDULES)
def test_latency_adds_up_what_each_method_costs_and_sizes_cost_later(schedule, methods):
    total, entering, weighed = 0.0, N, False
    for removed, method in zip(schedule.removed, methods, strict=True):
        leaving = entering - removed
        total += 0.4 * entering + 0.6 * leaving + (0.7 if weighed else 0.0)
        if removed:
            own = (CHEAP, DEAR)[method]
            total += own.per_block + own.per_tokens * entering / N
            weighed = weighed or method == 1
        entering = leaving
    known = mixed(CHEAP, DEAR)
    assert known.predict(schedule, methods) == pytest.approx(total)
    steps, places, state, added = known.steps(), {int(count): place for place, count in enumerate(LEVELS)}, 0, 0.0
    for (a, b), method in zip(pairwise((N, *schedule.tokens(N))), methods, strict=True):
        added += steps[state, 0, method or 0, places[a], places[b]]
        state = max(state, method or 0)
    assert DENSE_MS + added == pytest.approx(total)


def test_planted_overheads_of_several_methods_are_found():
    truth = mixed(CHEAP, DEAR)
    timed = [TimedSchedule(s, m, timing(truth.predict(s, m) / DENSE_MS)) for s, m in SCHEDULES]
    found = fit_overheads(mixed(NO_OVERHEAD, NO_OVERHEAD), timed)
    assert [m.overhead for m in found.models] == [pytest.approx(CHEAP, abs=1e-6), pytest.approx(DEAR, abs=1e-6)]


def fronts(proxy=lambda schedule: 1 - schedule.total_removed / 60, early=1.0):
    """TopK costs little in the first two blocks, ToMe in the last two; and the schedules whose proxy was measured."""
    asked = []
    factors = {"topk": np.array([early, early, 5.0, 5.0]), "tome": np.array([5.0, 5.0, 1.0, 1.0])}

    def measure(reduction, schedule):
        asked.append((reduction, schedule))
        return Estimate(proxy(schedule), 0.0)

    def front(name):
        own = np.where(costs() > 0, costs() * factors[name][:, None, None], costs())
        return MethodFront(name, resolve(name), latency(), own, measure)

    made = [front("topk"), front("tome")]
    return [*made, MixedFront(combinable(made), measure)], asked


def test_the_front_holds_schedules_of_several_methods_that_are_better_than_those_of_one():
    (topk, tome, several), _ = fronts()
    assert several.dense.is_dense
    for candidate in several.candidates[:-1]:
        assert candidate.is_mixed
        assert (candidate.method, candidate.reduction) == ("mixed", None)
        for block, spec in candidate.schedule.methods.items():
            assert str(spec) == ("topk" if block < 2 else "tome")
    keys = [candidate.key for candidate in several.all_candidates()]
    assert len(keys) == len(set(keys))

    def best(front, ratio):
        return min((c.cost for c in front.all_candidates() if c.ratio <= ratio), default=np.inf)

    for ratio in (0.6, 0.7, 0.8):
        assert best(several, ratio) < min(best(topk, ratio), best(tome, ratio))


def test_a_schedule_of_several_methods_is_timed_and_chosen_by_its_own_proxy():
    def proxy(schedule):
        return 1 - schedule.total_removed / (120 if isinstance(schedule.method, tuple) else 60)

    sources, asked = fronts(proxy)
    device = Device()
    best = device.search(sources, lp.LatencyBudget(speedup=1.5))
    assert best.candidate.is_mixed
    assert best.candidate.timing is not None
    assert best.candidate.accuracy == proxy(best.candidate.schedule)
    assert (None, best.candidate.schedule) in asked
    assert best.candidate.schedule.method_label in best.reason
    sources, _ = fronts(lambda schedule: 1 - schedule.total_removed / (30 if schedule.method else 60))
    assert not Device().search(sources, lp.LatencyBudget(speedup=1.5)).candidate.is_mixed


def test_where_one_method_is_best_in_all_blocks_several_are_not_tried():
    sources, asked = fronts(early=20.0)
    for source in sources:
        proposal = source.propose(lp.LatencyBudget(speedup=1.5), DENSE_MS, float("inf"))
        assert (proposal is None) == (source.label == "mixed")
    assert all(reduction is not None for reduction, _ in asked)


@pytest.mark.parametrize(("factor", "tried"), [(0.9, True), (1.5, True), (8.0, False)])
def test_no_proxy_is_measured_of_a_method_that_can_hardly_be_better(factor, tried):
    """One that is predicted to cost a little more is tried: predictions are not that exact."""
    asked = []

    def measure(reduction, schedule):
        asked.append(reduction.name)
        return Estimate(1 - schedule.total_removed / 60, 0.0)

    own = np.where(costs() > 0, factor * costs(), costs())
    topk = MethodFront("topk", resolve("topk"), latency(), costs(), measure)
    tome = MethodFront("tome", resolve("tome"), latency(), own, measure)
    tome.others = [topk]
    search = CandidateSearch(lp.LatencyBudget(speedup=1.5), [topk, tome], DENSE_MS)
    search.next_candidates(float("inf"))
    assert ("tome" in asked) == tried
    assert search.not_promising == ([] if tried else ["tome"])
    assert tome.estimate(tome.candidates[0]).value < 1.0  # by what is known of the other


def test_timings_of_the_methods_correct_the_front_of_several():
    (topk, tome, several), _ = fronts()
    before = several.fastest().ratio
    for front in (topk, tome):
        chosen = front.candidates[2]
        front.observe(chosen, timing(chosen.ratio + 0.1))
    several.propose(lp.LatencyBudget(speedup=1.5), DENSE_MS, float("inf"))
    assert several.fastest().ratio > before + 0.05


def test_what_a_file_cannot_name_is_not_combined():
    class Own(TopK):
        name = "own"

    methods = [TopK(), Own(), *map(resolve, ("tome", "resize", "vwt-intra", "pomt-nearest"))]
    known = [MethodFront(r.name, r, latency(), costs(), lambda *_: DENSE_ACCURACY) for r in methods]
    names = lambda *given: [front.label for front in combinable(*given)]  # noqa: E731
    assert names(known) == ["topk", "tome", "vwt-intra", "pomt-nearest"]
    assert names(known[:4]) == ["topk", "tome", "resize"]
    assert names(known, True) == ["topk", "vwt-intra"]
    assert names(known[2:], True) == ["tome", "pomt-nearest"]
