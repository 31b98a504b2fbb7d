"""The notebooks as they are committed: executed in order, without errors, small, and without traces of a machine.

`make notebooks` executes them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NAMES = ["01_first_steps", "02_schedule_under_a_budget", "03_export_and_run_without_torch"]
MOST_BYTES = 300_000
OF_A_MACHINE = re.compile(r"/(?:home|root|tmp|Users|private|var/folders)/|\b[A-Za-z]:\\|ipykernel_|site-packages")
OUTPUTS = {"stream", "display_data", "execute_result"}  # an error is none of them


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def texts(notebook: dict[str, Any]) -> Iterator[str]:
    """All that people read, and no pixels."""
    for cell in notebook["cells"]:
        yield joined(cell["source"])
        for output in cell.get("outputs", []):
            yield joined(output.get("text", ""))
            yield from (joined(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/"))


@pytest.fixture(params=NAMES)
def path(request: pytest.FixtureRequest) -> Path:
    return FOLDER / f"{request.param}.ipynb"


@pytest.fixture
def notebook(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


@pytest.fixture
def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_all_notebooks_are_named_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


def test_any_python_runs_them(notebook: dict[str, Any]) -> None:
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}  # no widgets
    assert set(notebook["metadata"]["language_info"]) == {"name"}  # no version


def test_cells_were_executed_in_order(code_cells: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in code_cells] == list(range(1, len(code_cells) + 1))
    assert not any(cell["metadata"] for cell in code_cells)  # neither times nor states of the page


def test_outputs_are_there_and_none_is_an_error_or_a_warning(code_cells: list[dict[str, Any]]) -> None:
    for cell in code_cells:
        source, outputs = joined(cell["source"]), cell["outputs"]
        assert outputs or not re.search(r"\b(?:print|display|describe|run_without_torch)\(", source), source
        assert {output["output_type"] for output in outputs} <= OUTPUTS, source
        assert {output["name"] for output in outputs if output["output_type"] == "stream"} <= {"stdout"}, source
        if "display(" in source:
            assert any("image/png" in output.get("data", {}) for output in outputs), source


def test_no_trace_of_a_machine(notebook: dict[str, Any]) -> None:
    for text in texts(notebook):
        assert not OF_A_MACHINE.search(text), text


def test_links(notebook: dict[str, Any]) -> None:
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"):
        for link in re.findall(r"\]\(([^)#]+)", joined(cell["source"])):
            assert (FOLDER / link).exists(), link


def test_it_is_small(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES


def test_it_begins_with_what_to_install(notebook: dict[str, Any]) -> None:
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "pip install '.[notebooks]'" in joined(first["source"])
