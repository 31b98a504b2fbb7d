"""The examples in the docstrings run and print what they say; what a user calls has one."""

import doctest
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp

MODULES = [info.name for info in pkgutil.walk_packages(lp.__path__, "lightning_prune.")]
QUIET = [name for name in MODULES if name != "lightning_prune.__main__"]
NEEDS = {"lightning_prune.runtimes.executorch_runtime": "executorch"}  # a package that no extra installs
RETURNED = {"LatencyProfile", "PatchHandle", "Plan"}  # made by functions whose examples show them


@pytest.mark.all_rounds
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", QUIET)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(import_module(name), optionflags=options, raise_on_error=False)
    assert not result.failed


def has_example(thing: Any) -> bool:
    finder = doctest.DocTestFinder(recurse=inspect.isclass(thing))
    return any(test.examples for test in finder.find(thing, "thing"))


@pytest.mark.parametrize("name", lp.__all__)
def test_what_a_user_calls_has_an_example(name: str) -> None:
    thing = getattr(lp, name)
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if callable(thing) and not is_error and name not in RETURNED:
        assert has_example(thing)
