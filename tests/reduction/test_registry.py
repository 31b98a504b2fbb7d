"""Methods of other packages, which are created as distributions in a folder on the path."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import lightning_prune as lp
from helpers.fresh import run_fresh
from lightning_prune.errors import ArgumentError
from lightning_prune.reduction import METHODS, POMT, RandomDrop, TokenSequence, names, resolve

OWN = [*METHODS, "pomt-nearest"]
GOOD = """
import torch
from lightning_prune.reduction import Reduction
from lightning_prune.reduction.functional import keep_best

class Middle(Reduction):
    name = "middle"
    def __init__(self, factor=1.0):
        self.factor = factor
    def reduce(self, sequence, remove):
        count = sequence.tokens.shape[1] - sequence.num_prefix_tokens
        scores = -(torch.arange(count) - count / 2).abs().expand(len(sequence.tokens), -1)
        return keep_best(sequence.tokens, scores * self.factor, remove, sequence.num_prefix_tokens)
    def max_removed(self, tokens, num_prefix_tokens):
        return tokens - num_prefix_tokens - 1
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution with one module and its entry points on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(package: str, source: str, **points: str) -> None:
        monkeypatch.delitem(sys.modules, package, raising=False)
        (tmp_path / f"{package}.py").write_text(source)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name.replace('_', '-')} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[lightning_prune.reductions]", *lines]) + "\n")

    return put


def test_an_entry_point_is_found_by_name_and_patches_a_model(install: Install) -> None:
    install("good_pkg", GOOD, middle="good_pkg:Middle")
    method = resolve("middle")
    assert type(method).__module__ == "good_pkg"
    reduced = method.reduce(TokenSequence(torch.randn(2, 10, 4), 0, False), 4)
    assert reduced.positions.tolist() == [[2, 3, 4, 5, 6, 7]] * 2
    assert names() == [*OWN, "middle"]
    assert resolve("middle", factor=2.0) == type(method)(2.0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    with lp.patch(vit, "middle", [0, 5]), torch.no_grad():
        assert vit(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_only_the_requested_entry_point_is_imported(install: Install) -> None:
    install("good_pkg", GOOD, middle="good_pkg:Middle")
    install("other_pkg", "raise AssertionError('imported')", other="other_pkg:Other")
    resolve("pomt")
    assert "good_pkg" not in sys.modules
    with pytest.raises(ArgumentError, match=r"one of 'pomt', .*'middle', .*got 'midle'\. Did you mean 'middle'\?"):
        resolve("midle")
    assert "good_pkg" not in sys.modules
    resolve("middle")
    assert "other_pkg" not in sys.modules


def test_importing_the_package_reads_no_entry_points() -> None:
    code = """
import importlib.metadata
looks = importlib.metadata.entry_points
def refuse(**options):  # torch looks for its own
    if options.get("group") == "lightning_prune.reductions":
        raise SystemExit("entry points were looked at")
    return looks(**options)
importlib.metadata.entry_points = refuse
import lightning_prune, sys
import lightning_prune.reduction
lightning_prune.reduction.resolve("pomt")
try:
    lightning_prune.reduction.names()
except SystemExit:
    print("seen")
"""
    assert run_fresh(code) == (0, "seen\n", "")


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("import not_there_at_all", "bad_pkg:Bad", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("raise RuntimeError('no licence')", "bad_pkg:Bad", "RuntimeError: no licence"),
        ("", "bad_pkg:Bad", "AttributeError: module 'bad_pkg' has no attribute 'Bad'"),
        ("", "nowhere_pkg:Bad", "ModuleNotFoundError: No module named 'nowhere_pkg'"),
    ],
)
def test_an_entry_point_that_fails_to_load_is_named_and_others_work(
    install: Install, source: str, value: str, message: str
) -> None:
    install("bad_pkg", source, bad=value)
    install("good_pkg", GOOD, middle="good_pkg:Middle")
    text = rf"The method 'bad' failed to load from bad = '{value}' of bad_pkg: {message}"
    with pytest.raises(ArgumentError, match=text) as caught:
        resolve("bad")
    assert caught.value.__cause__ is not None
    assert resolve("middle").name == "middle"
    with pytest.warns(UserWarning, match=text):
        assert names() == [*OWN, "middle"]


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("Bad = 3", "bad_pkg:Bad", "must be a subclass of Reduction .*, got 3"),
        (
            "class Bad: name = 'bad'",
            "bad_pkg:Bad",
            "subclass of Reduction .*, got <class 'bad_pkg.Bad'>",
        ),
        (GOOD + "Bad = Middle()", "bad_pkg:Bad", r"must be a subclass of Reduction .*, got Middle\(factor=1.0\)"),
        (GOOD + "def Bad(): return Middle()", "bad_pkg:Bad", "must be a subclass of Reduction .*, got <function"),
        (GOOD + "class Bad(Reduction):\n name='bad'", "bad_pkg:Bad", "with `reduce` and `max_removed`, got <class"),
        (GOOD, "bad_pkg:Middle", r"name 'bad', got Middle with 'middle'"),
        (
            GOOD + "class Bad(Middle):\n name = None",
            "bad_pkg:Bad",
            r"name 'bad', got Bad with None",
        ),
        (GOOD, "bad_pkg", r"must be a subclass of Reduction .*, got <module 'bad_pkg'"),
    ],
)
def test_an_entry_point_of_another_type_is_rejected(install: Install, source: str, value: str, message: str) -> None:
    install("bad_pkg", source, bad=value)
    with pytest.raises(ArgumentError, match=rf"The entry point bad = '{value}' of bad_pkg .*{message}"):
        resolve("bad")
    with pytest.warns(UserWarning, match=message):
        assert names() == OWN


@pytest.mark.parametrize("name", ["pomt", "pomt-nearest"])
def test_entry_points_cannot_replace_names_of_the_package(install: Install, name: str) -> None:
    install("bad_pkg", GOOD, **{name.replace("-", "_"): "bad_pkg:Middle"})
    text = rf"The entry point {name} = 'bad_pkg:Middle' of bad_pkg is ignored: '{name}' is a method of lightning_prune"
    with pytest.warns(UserWarning, match=text):
        assert names() == OWN
    assert isinstance(resolve(name), POMT)
    assert "bad_pkg" not in sys.modules


def test_a_name_declared_by_two_packages_is_rejected(install: Install) -> None:
    install("one_pkg", GOOD, middle="one_pkg:Middle")
    install("two_pkg", GOOD, middle="two_pkg:Middle")
    with pytest.raises(ArgumentError, match=r"Several packages declare a method 'middle': .*one_pkg.*two_pkg"):
        resolve("middle")
    with pytest.warns(UserWarning, match="Several packages declare a method 'middle'"):
        assert names() == OWN


def test_names_without_entry_points() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names()[: len(OWN)] == OWN
    assert "random" in OWN
    assert "vwt-intra" in OWN


def test_settings() -> None:
    assert resolve("random", seed=4, site="input") == RandomDrop(4, "input")
    assert resolve("pomt", dropped="nearest") == POMT("nearest")
    assert resolve("pomt-nearest") == POMT("nearest")
    assert resolve("pomt-nearest").name == "pomt-nearest"
    assert resolve("pomt-nearest", proportional_attention=False) == POMT("nearest", False)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("random", {"sed": 1}, r"`settings` must be arguments of the method 'random', got \{'sed': 1\}"),
        ("pomt-nearest", {"dropped": "mean"}, r"`settings` must be .* 'pomt-nearest', got .*'dropped'"),
        ("random", {"seed": -1}, r"`seed` must be an integer >= 0, got -1"),
        (
            RandomDrop(),
            {"seed": 1},
            r"`settings` must be left out with a Reduction, got \{'seed': 1\} and RandomDrop\(",
        ),
    ],
)
def test_invalid_settings_are_rejected(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        resolve(method, **settings)
