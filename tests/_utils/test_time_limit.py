"""A time limit on a clock that a test sets."""

from math import inf

import pytest

from lightning_prune._utils.time_limit import TimeLimit


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_shares_are_of_what_is_left():
    clock = Clock()
    limit = TimeLimit(60.0, clock)
    assert (limit.elapsed, limit.left(), limit.share(0.5), limit.deadline(0.5)) == (0.0, 60.0, 30.0, 130.0)
    clock.now += 40
    assert (limit.elapsed, limit.left(), limit.share(0.5), limit.deadline()) == (40.0, 20.0, 10.0, 160.0)


def test_nothing_is_left_after_the_end_but_a_share_is_never_zero():
    clock = Clock()
    limit = TimeLimit(1.0, clock)
    clock.now += 5
    assert (limit.left(), limit.share(0.5), limit.deadline()) == (0.0, pytest.approx(1e-3), 105.0)


def test_without_a_limit_everything_is_left():
    limit = TimeLimit(None, Clock())
    assert (limit.left(), limit.share(0.5), limit.deadline(0.1)) == (inf, None, inf)
