"""From points of the programme to schedules: which are kept, and how timings correct them."""

import pytest

from lightning_prune import Schedule
from lightning_prune.planning.dynamic_program import FrontPoint
from lightning_prune.planning.multi_block import entries_of, numbered, undominated
from lightning_prune.planning.results import FrontEntry

POINTS = [
    FrontPoint(100.0, 0.0, (17, 17)),
    FrontPoint(80.0, 0.1, (17, 9)),
    FrontPoint(60.0, 0.2, (13, 9)),
    FrontPoint(50.0, 0.4, (9, 9)),
]


def latencies(entries):
    return [entry.milliseconds for entry in entries]


def test_points_become_schedules():
    made = entries_of("topk", POINTS, 17, [], [])
    assert [entry.schedule.removed for entry in made] == [(0, 0), (0, 8), (4, 4), (8, 0)]
    assert latencies(made) == [100, 80, 60, 50]
    assert {entry.method for entry in made} == {"topk"}


def test_what_was_timed_corrects_its_neighbours_and_less_those_near_dense():
    made = entries_of("topk", POINTS, 17, [60.0], [66.0])
    assert latencies(made) == pytest.approx([100, 80 * 1.05, 66, 55])
    # Straight between two that were timed, in whatever order they come.
    made = entries_of("topk", POINTS, 17, [80.0, 50.0], [80.0, 56.0])
    assert latencies(made) == pytest.approx([100, 80, 60 * (1 + 0.12 * 2 / 3), 56])


def test_a_schedule_that_is_slower_than_a_cheaper_one_is_dropped():
    made = entries_of("topk", POINTS, 17, [80.0, 60.0, 50.0], [80.0, 81.0, 50.0])
    assert latencies(made) == [100, 80, 50]


def entry(milliseconds, cost, removed):
    return FrontEntry("topk", Schedule(removed), milliseconds, cost)


DENSE = entry(100.0, 0.0, (0, 0))


def test_of_those_that_are_as_fast_the_cheapest_and_the_fastest_are_numbered():
    made = numbered([DENSE, entry(60.3, 0.01, (0, 8)), entry(60.2, 0.5, (8, 0)), entry(60.05, 5.0, (12, 0))])
    assert [(e.milliseconds, e.cost) for e in made] == [(60.05, 5.0), (60.3, 0.01), (100.0, 0.0)]


def test_dense_stays_where_another_costs_nothing():
    free = entry(90.0, 0.0, (0, 1))
    assert undominated([DENSE, free, entry(95.0, 0.0, (1, 0))]) == [DENSE, free]
    assert numbered([DENSE]) == [DENSE]
