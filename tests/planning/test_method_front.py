"""The front of a method: which of it is chosen from, and what is kept."""

from lightning_prune.planning.method_front import MethodFront
from lightning_prune.planning.programme import FrontPoint
from lightning_prune.reduction import resolve


def front(*points):
    made = [FrontPoint(milliseconds, cost, levels) for milliseconds, cost, levels in points]
    return MethodFront(resolve("topk"), made, 17, lambda reduction, schedule: 1 - schedule.total / 100, "proxy")


DENSE = (100.0, 0.0, (17, 17))


def test_of_those_that_are_as_fast_the_cheapest_and_the_fastest_are_numbered():
    made = front(DENSE, (60.3, 0.01, (17, 9)), (60.2, 0.5, (9, 9)), (60.05, 5.0, (5, 5)))
    assert [(entry.milliseconds, entry.cost) for entry in made.entries] == [(60.05, 5.0), (60.3, 0.01), (100.0, 0.0)]
    assert made.dense == 3


def test_everything_is_kept_with_what_was_measured():
    made = front(DENSE, (60.3, 0.01, (17, 9)), (60.2, 0.5, (9, 9)), (60.05, 5.0, (5, 5)))
    assert made(2) == 0.92
    assert [(e.milliseconds, e.accuracy) for e in made.everything()] == [
        (100.0, 1.0),
        (60.3, 0.92),
        (60.2, None),
        (60.05, None),
    ]


def test_dense_alone():
    made = front(DENSE)
    assert (made.dense, made.entry(1).schedule.total, len(made.everything())) == (1, 0, 1)
