"""What the tests of the programs in `examples` share."""

import importlib
import sys
from typing import Any

import pytest

from helpers import ROOT

FOLDER = ROOT / "examples" / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of them as it would be run: its folder first on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
