"""The dynamic programme against all schedules, one by one."""

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest

from lightning_prune.planning.dynamic_program import optimal_schedules


def enumerated(levels, milliseconds, costs, dense_ms):
    """Latency and cost of every schedule, in plain loops."""
    depth, top = len(costs), len(levels) - 1
    for leaving in combinations_with_replacement(range(top, -1, -1), depth):
        entering, total, cost = top, dense_ms, 0.0
        for block, place in enumerate(leaving):
            total += milliseconds[entering][place]
            cost += costs[block][entering][place]
            entering = place
        if np.isfinite(total + cost):
            yield total, cost, tuple(levels[place] for place in leaving)


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
    return levels, np.where(below, added, np.inf), np.where(off, np.inf, costs), 24.0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("closed", [0.0, 0.4])
def test_front_is_that_of_all_schedules(seed, closed):
    levels, milliseconds, costs, dense_ms = problem(seed, closed=closed)
    front = optimal_schedules(levels, milliseconds, costs, dense_ms)
    everything = list(enumerated(levels, milliseconds, costs, dense_ms))
    known = {schedule: (total, cost) for total, cost, schedule in everything}
    for point in front:  # what is reported of a schedule is so
        assert known[point.levels] == pytest.approx((point.milliseconds, point.cost))
    tolerance = 5 * dense_ms / 4000  # half a slot for each block, and as much again
    for total, cost, _ in everything:  # and no schedule is better by more than the grid
        assert any(p.milliseconds <= total + tolerance and p.cost <= cost + 1e-9 for p in front)


def test_front_goes_from_dense_to_the_fastest_and_every_point_is_cheaper_than_the_next():
    levels, milliseconds, costs, dense_ms = problem(3)
    front = optimal_schedules(levels, milliseconds, costs, dense_ms)
    assert front[0].levels == (197,) * 5
    assert (front[0].milliseconds, front[0].cost) == (dense_ms, 0.0)
    assert all(a.milliseconds > b.milliseconds and a.cost < b.cost for a, b in pairwise(front))
    fastest = min(total for total, _, _ in enumerated(levels, milliseconds, costs, dense_ms))
    assert front[-1].milliseconds == pytest.approx(fastest)


def test_a_price_for_each_reducing_block_makes_few_of_them_reduce():
    cheap, dear = problem(5, price=0.01), problem(5, price=1.5)
    blocks = [np.mean([len({197, *point.levels}) for point in optimal_schedules(*given)]) for given in (cheap, dear)]
    assert blocks[0] > blocks[1]


def test_where_nothing_is_gained_dense_is_all_there_is():
    levels, milliseconds, costs, dense_ms = problem(1, price=50.0)
    assert len(optimal_schedules(levels, milliseconds, costs, dense_ms)) == 1


def test_as_many_blocks_and_levels_as_there_are_take_no_time():
    levels, milliseconds, costs, dense_ms = problem(0, depth=24, count=40)
    front = optimal_schedules(levels, milliseconds, costs, dense_ms)
    assert len(front) > 100
