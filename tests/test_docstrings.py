"""The examples in the docstrings run and print what they say."""

import doctest
import pkgutil
from importlib import import_module

import pytest
import torch

import lightning_prune

MODULES = [info.name for info in pkgutil.walk_packages(lightning_prune.__path__, "lightning_prune.")]
QUIET = [name for name in MODULES if name != "lightning_prune.__main__"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", QUIET)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(import_module(name), optionflags=options, raise_on_error=False)
    assert not result.failed


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [test for name in QUIET for test in finder.find(import_module(name)) if test.examples]
    assert len(found) >= 15
