"""Which counts a search goes through, and what its methods are called."""

from itertools import pairwise

import pytest

from lightning_prune import ArgumentError, LatencyProfile
from lightning_prune.planning.multi_block import method_labels, search_levels
from lightning_prune.reduction import POMT, RandomDrop, Reduction, ToMe, TopK


def curve(latency, spread=0.001):
    tokens = tuple(sorted(latency))
    milliseconds = tuple(latency[count] for count in tokens)
    return LatencyProfile(tokens, milliseconds, (spread,) * len(tokens), (9,) * len(tokens), "random", 0, 12)


def test_few_counts_are_all_gone_through():
    assert search_levels(curve({20: 2.0, 60: 5.0, 100: 10.0})) == [20, 60, 100]


def test_of_many_the_lower_edges_of_cliffs_stay():
    stairs = {count: 0.01 * count + 2.0 * sum(count > edge for edge in (33, 77, 120)) for count in range(2, 198)}
    levels = search_levels(curve(stairs))
    assert len(levels) == 40
    assert {2, 33, 77, 120, 197} <= set(levels)
    assert max(b - a for a, b in pairwise(levels)) <= 8


def test_where_nothing_is_gained_dense_alone_is_left():
    assert search_levels(curve({20: 9.9, 100: 10.0})) == [100]
    assert search_levels(curve({20: 5.0, 100: 10.0}, spread=20.0)) == [100]


def test_names_are_labels_where_they_differ():
    assert list(method_labels([ToMe(), POMT(), POMT("nearest")]).values()) == ["tome", "pomt", "pomt-nearest"]


class Silent(Reduction):
    """Does not say what distinguishes it."""

    name = "silent"

    def __init__(self, secret):
        self.secret = secret

    def max_removed(self, tokens, prefix_tokens):
        return 1

    def reduce(self, sequence, remove):
        raise AssertionError("labels are made without reducing anything")

    def settings(self):
        return {}


def test_what_settings_do_not_tell_apart_is_numbered():
    assert list(method_labels([Silent(1), TopK(), Silent(2), Silent(3)]).values()) == [
        "silent",
        "topk",
        "silent #2",
        "silent #3",
    ]


def test_the_same_method_twice_is_refused():
    with pytest.raises(ArgumentError, match=r"`methods` must differ from one another, got Random\(seed=3, .*\) twice"):
        method_labels([RandomDrop(seed=3), TopK(), RandomDrop(seed=3)])
