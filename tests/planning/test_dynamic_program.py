"""The dynamic programme against all schedules, one by one."""

from itertools import combinations_with_replacement, pairwise, product

import numpy as np
import pytest

from lightning_prune.planning.dynamic_program import optimal_schedules


def enumerated(levels, milliseconds, costs, dense_ms, weighs=()):
    """Latency, cost, counts and methods of every schedule, in plain loops."""
    depth, methods, top = len(costs), costs.shape[1], len(levels) - 1
    for leaving in combinations_with_replacement(range(top, -1, -1), depth):
        entered = (top, *leaving[:-1])
        choices = [range(methods) if b < a else [None] for a, b in zip(entered, leaving, strict=True)]
        for chosen in product(*choices):
            total, cost, weighed = dense_ms, 0.0, 0
            for block, (entering, place, method) in enumerate(zip(entered, leaving, chosen, strict=True)):
                own = method or 0
                total += milliseconds[weighed if len(milliseconds) > 1 else 0, 0, own, entering, place]
                cost += costs[block, own, entering, place]
                weighed = max(weighed, int(method is not None and bool(weighs) and weighs[method]))
            if np.isfinite(total + cost):
                yield total, cost, tuple(levels[place] for place in leaving), chosen


def problem(seed, depth=5, count=5, price=0.3, closed=0.0):
    """Random but monotone: fewer tokens are faster and cost more; some steps are not allowed."""
    random = np.random.default_rng(seed)
    levels = [*sorted(random.choice(np.arange(10, 197), count - 1, replace=False).tolist()), 197]
    block = np.sort(random.uniform(-3, 0, count))
    block[-1] = 0.0
    places = np.arange(count)
    below = places[None, :] <= places[:, None]
    added = 0.4 * block[:, None] + 0.6 * block[None, :] + price * (places[None, :] < places[:, None])
    alone = np.sort(random.exponential(1.0, (depth, count)), axis=1)[:, ::-1].copy()
    alone[:, -1] = 0.0
    costs = np.maximum(alone[:, None, :] - alone[:, :, None], 0.0)
    costs = np.where(below[None], costs, np.inf)
    off = random.random(costs.shape) < closed
    off[:, places, places] = False
    milliseconds = np.where(below, added, np.inf)
    return levels, milliseconds[None, None, None], np.where(off, np.inf, costs)[:, None], 24.0


def mixed_problem(seed, weighs, later=0.2, depth=4, count=4):
    """Two or three methods with their own costs and prices; the sizes of some slow all later blocks."""
    levels, milliseconds, _, dense_ms = problem(seed, depth, count, price=0.0)
    random, places = np.random.default_rng(seed), np.arange(count)
    reduces, is_later = places[None, :] < places[:, None], (places < count - 1)[:, None]
    prices = random.uniform(0.0, 0.6, len(weighs))
    own = np.stack([milliseconds[0, 0, 0] + price * reduces for price in prices])
    costs = np.concatenate([problem(seed + 100 * (n + 1), depth, count)[2] for n in range(len(weighs))], axis=1)
    return levels, np.stack([own, own + later * is_later])[:, None], costs, dense_ms, weighs


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("closed", [0.0, 0.4])
def test_front_is_that_of_all_schedules(seed, closed):
    levels, milliseconds, costs, dense_ms = problem(seed, closed=closed)
    check_against_all(optimal_schedules(levels, milliseconds, costs, dense_ms), levels, milliseconds, costs, dense_ms)


def check_against_all(front, levels, milliseconds, costs, dense_ms, weighs=()):
    everything = list(enumerated(levels, milliseconds, costs, dense_ms, weighs))
    known = {(counts, methods): (total, cost) for total, cost, counts, methods in everything}
    for point in front:  # what is reported of a schedule is so
        assert known[point.levels, point.methods] == pytest.approx((point.milliseconds, point.cost))
    tolerance = len(costs) * dense_ms / 2000  # half a slot for each block, and as much again
    for total, cost, *_ in everything:  # and no schedule is better by more than the grid
        assert any(p.milliseconds <= total + tolerance and p.cost <= cost + 1e-9 for p in front)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighs", [(False, True), (True, False, False), (True, True)], ids=str)
def test_front_is_that_of_all_schedules_of_all_methods(seed, weighs):
    given = mixed_problem(seed, weighs)
    front = optimal_schedules(*given)
    check_against_all(front, *given)
    assert {method for point in front for method in point.methods} - {None}


def test_sizes_that_make_later_blocks_faster_are_no_reason_to_miss_a_schedule():
    """As a fit to noisy timings may say."""
    given = mixed_problem(2, (False, True), later=-0.3)
    check_against_all(optimal_schedules(*given), *given)


def test_a_method_that_is_better_in_some_blocks_is_used_there():
    levels, milliseconds, costs, dense_ms, weighs = mixed_problem(1, (False, False), later=0.0)
    costs[:2, 1], costs[2:, 0] = 10 * costs[:2, 1], 10 * costs[2:, 0]
    used = {
        (block, method)
        for point in optimal_schedules(levels, milliseconds, costs, dense_ms, weighs)
        for block, method in enumerate(point.methods)
        if method is not None
    }
    assert {(0, 0), (2, 1)} <= used <= {(0, 0), (1, 0), (2, 1), (3, 1)}


def test_front_goes_from_dense_to_the_fastest_and_every_point_is_cheaper_than_the_next():
    levels, milliseconds, costs, dense_ms = problem(3)
    front = optimal_schedules(levels, milliseconds, costs, dense_ms)
    assert (front[0].levels, front[0].methods) == ((197,) * 5, (None,) * 5)
    assert (front[0].milliseconds, front[0].cost) == (dense_ms, 0.0)
    assert all(a.milliseconds > b.milliseconds and a.cost < b.cost for a, b in pairwise(front))
    fastest = min(total for total, *_ in enumerated(levels, milliseconds, costs, dense_ms))
    assert front[-1].milliseconds == pytest.approx(fastest)


def test_a_price_for_each_reducing_block_makes_few_of_them_reduce():
    cheap, dear = problem(5, price=0.01), problem(5, price=1.5)
    blocks = [np.mean([len({197, *point.levels}) for point in optimal_schedules(*given)]) for given in (cheap, dear)]
    assert blocks[0] > blocks[1]


def test_where_nothing_is_gained_dense_is_all_there_is():
    levels, milliseconds, costs, dense_ms = problem(1, price=50.0)
    assert len(optimal_schedules(levels, milliseconds, costs, dense_ms)) == 1


def test_as_many_blocks_levels_and_methods_as_there_are_take_no_time():
    front = optimal_schedules(*mixed_problem(0, (True, True, False, False), depth=12, count=40))
    assert len(front) > 100
