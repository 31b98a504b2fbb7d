import copy
import pickle
from typing import Any

import pytest

from lightning_prune.errors import ArgumentError
from lightning_prune.reduction import METHODS, POMT, RandomDrop, Reduction, resolve


def test_names_resolve_to_default_instances() -> None:
    assert resolve("pomt") == POMT()
    assert resolve("random") == RandomDrop()
    assert all(METHODS[name].name == name for name in METHODS)


def test_an_instance_is_returned_unchanged() -> None:
    method = RandomDrop(seed=4)
    assert resolve(method) is method


@pytest.mark.parametrize(
    ("given", "nearest"), [("pmot", "pomt"), ("pomt ", "pomt"), ("POMT", "pomt"), ("randm", "random")]
)
def test_an_unknown_name_suggests_a_similar_one(given: str, nearest: str) -> None:
    with pytest.raises(ArgumentError, match=rf"one of 'pomt', .*'random'.* got '{given}'\. Did you mean '{nearest}'\?"):
        resolve(given)


@pytest.mark.parametrize("given", ["zzz", "", None, 3, POMT])
def test_a_dissimilar_name_gets_no_suggestion(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`method` must be (a Reduction or one of|a name or) .*, got [^?]*$"):
        resolve(given)


def test_equality_and_hash_depend_on_class_and_settings() -> None:
    assert POMT() == POMT()
    assert RandomDrop(1) == RandomDrop(1)
    assert RandomDrop(1) != RandomDrop(2)
    assert RandomDrop(1) != RandomDrop(1, site="input")
    assert POMT() != RandomDrop()
    assert POMT() != "pomt"
    assert len({POMT(), POMT(), RandomDrop(1), RandomDrop(1), RandomDrop(2)}) == 3


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (POMT(), "POMT()"),
        (RandomDrop(), "RandomDrop(seed=0, site='block')"),
        (RandomDrop(3, "input"), "RandomDrop(seed=3, site='input')"),
        (POMT("nearest", False), "POMT(dropped='nearest', proportional_attention=False)"),
    ],
)
def test_repr_can_be_evaluated(method: Reduction, text: str) -> None:
    assert repr(method) == text
    assert eval(text, {"POMT": POMT, "RandomDrop": RandomDrop}) == method


@pytest.mark.parametrize("method", [POMT(), RandomDrop(3, "input"), POMT("nearest", False)], ids=repr)
def test_copies_and_pickles(method: Reduction) -> None:
    assert copy.deepcopy(method) == method
    assert pickle.loads(pickle.dumps(method)) == method


def test_sites_and_reads() -> None:
    assert (POMT().site, POMT().reads, POMT().proportional_attention) == ("block", {"attention"}, False)
    assert (RandomDrop().site, RandomDrop().reads) == ("block", frozenset())
    assert RandomDrop(site="input").site == "input"
