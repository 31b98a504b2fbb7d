"""What holds for every test: one thread, few rounds, and no profile that another test or the user has measured."""

import base64
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One thread for each process that the tests run in, and start: their models are tiny, and threads that wait for one
# another would take longer than the work. Before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def _no_profiles_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test finds a profile of the user, or of another test, and none leaves one."""
    folder = tmp_path_factory.getbasetemp() / f"profiles-{uuid.uuid4().hex}"
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(folder))


@pytest.fixture(autouse=True)
def _few_rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds of each measurement, except where measuring itself is tested: no test may rely on its figures."""
    of_measuring = {"profiling", "planning", "golden"} & set(request.path.parts)
    if not of_measuring and request.node.get_closest_marker("all_rounds") is None:
        from helpers.clock import set_few_rounds

        set_few_rounds(monkeypatch)


@pytest.fixture
def with_controls() -> None:
    """For tests of the rows that comparisons add; the rows of all others are those that the test names."""


@pytest.fixture(autouse=True)
def _no_controls(request: pytest.FixtureRequest) -> Iterator[None]:
    """No rows but those that a test names, except where the added ones are tested."""
    of_comparisons = {"callbacks", "classification", "cli", "comparison", "profiling"} & set(request.path.parts)
    with pytest.MonkeyPatch.context() as own:  # not the one of the test, which may undo what it has patched
        if of_comparisons and "with_controls" not in request.fixturenames:
            from lightning_prune.comparison import request_reading

            own.setattr(request_reading, "CONTROLS", ())
        yield


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def drawn() -> None:
    """For tests of commands and comparisons whose figures are drawn, in few pixels."""


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel for each figure of a command or a comparison: they draw several, which `report` is tested for."""
    if not {"cli", "comparison"} & set(request.path.parts):
        return
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    def save(self: Figure, path: Path, **options: Any) -> None:
        if "drawn" in request.fixturenames:
            savefig(self, path, **{**options, "dpi": 30})
        else:
            Path(path).write_bytes(PIXEL)

    monkeypatch.setattr(Figure, "savefig", save)
