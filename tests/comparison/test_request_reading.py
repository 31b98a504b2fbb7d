"""Names of methods, as users write them."""

from typing import Any

import pytest

import lightning_prune as lp
from lightning_prune.comparison.request_reading import read_methods
from lightning_prune.comparison.requests import VariantRequest
from lightning_prune.planning.method_selection import AUTO_METHODS
from lightning_prune.reduction import POMT, RandomDrop, names, resolve


def read(*methods: Any, own: Any = None) -> list[VariantRequest]:
    return read_methods(list(methods), own or POMT())


def test_dense_is_first_and_always_there() -> None:
    for methods in (["pomt", "dense"], ["dense", "pomt"], ["pomt"]):
        assert read(*methods) == [VariantRequest("dense", None, False), VariantRequest("pomt", POMT(), False)]


def test_8_bits_alone_and_together() -> None:
    both, alone, planned = read("random+int8", "int8", "auto+int8")[1:]
    assert (planned.name, planned.method, planned.int8, planned.has_targets) == ("auto+int8", "auto", True, True)
    assert planned.searched == AUTO_METHODS
    assert both == VariantRequest("random+int8", RandomDrop(), True)
    assert alone == VariantRequest("int8", None, True)
    assert [(e.method, e.has_targets) for e in read("random+int8", "int8")] == [
        *(("", False), ("random", True), ("int8", False))
    ]


def test_the_exact_tail_alone_and_with_8_bits() -> None:
    found = read("exact", "exact+int8")[1:]
    assert found == [
        VariantRequest("exact", None, False, exact=True),
        VariantRequest("exact+int8", None, True, exact=True),
    ]
    assert [(request.method, request.has_targets) for request in found] == [("exact", False)] * 2


def test_every_method_that_its_name_is_enough_for() -> None:
    simple = [name for name in names() if name != "vwt-inter"]
    assert [entry.reduction for entry in read(*simple)[1:]] == [resolve(name) for name in simple]


def test_the_name_of_the_pruners_own_method_means_its_settings() -> None:
    own = RandomDrop(seed=3)
    assert read("random", "pomt", own=own)[1:] == [
        VariantRequest("random", own, False),
        VariantRequest("pomt", POMT(), False),
    ]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], r"`methods` must be a list of names, got \[\]\."),
        ("pomt", r"`methods` must be a list of names, got 'pomt'\."),
        (["dense"], r"`methods` must name one to compare with dense, got \['dense'\]\."),
        (["pomt", "random", "pomt"], r"`methods` must differ from one another, got 'pomt' twice\."),
        (["pmot"], r"`methods` must be of dense, pomt, .*, int8, .* got 'pmot'\. Did you mean 'pomt'\?"),
        (["int9"], r"got 'int9'\. Did you mean 'int8'\?"),
        (["ramdom+int8"], r"got 'ramdom\+int8'\. Did you mean 'random\+int8'\?"),
        (["atuo+int8"], r"got 'atuo\+int8'\. Did you mean 'auto\+int8'\?"),
        (["dnse"], r"got 'dnse'\. Did you mean 'dense'\?"),
        (["dense+int8"], r"got 'dense\+int8'\. Did you mean 'int8'\?"),
        (["zzzzzz"], r"got 'zzzzzz'\.$"),
        ([3], r"`methods` must hold names and reductions, got 3\."),
    ],
)
def test_names_that_are_none(methods: Any, message: str) -> None:
    with pytest.raises(lp.ArgumentError, match=message):
        read_methods(methods, POMT())


def test_a_method_that_a_name_is_not_enough_for_says_what_it_needs() -> None:
    with pytest.raises(lp.ArgumentError, match="vocabulary"):
        read("vwt-inter")
