"""The sweep over families, methods and formats: its cases, how it goes on, and the table in docs/runtimes.md."""

import csv
from pathlib import Path
from typing import Any

import pytest

import lightning_prune as lp
from helpers import ROOT

RESULTS = ROOT / "examples" / "results"


@pytest.fixture
def sweep(program: Any) -> Any:
    return program("export_sweep")


def test_every_family_of_the_command_models_is_in_it(sweep: Any) -> None:
    with (RESULTS / "coverage_timm.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = {(row["model"], row["reducible"], row["block"]) for row in rows if row["reducible"] != "no"}
    wanted = {(model, reducible, block if "after" in reducible else "") for model, reducible, block in wanted}
    # A classifier around an encoder of a vision-language model exports as that does.
    wanted = {row for row in wanted if not (row[1] == "with restore" and row[0].endswith("Classifier"))}
    names = {name for name, _ in sweep.FAMILIES.values()}
    covered = [row for row in rows if row["name"] in names]
    assert wanted == {
        (row["model"], row["reducible"], row["block"] if "after" in row["reducible"] else "") for row in covered
    }
    assert len(covered) == len(sweep.FAMILIES) - 3  # torchvision, Hugging Face, OpenCLIP


def test_cases(sweep: Any) -> None:
    found = sweep.cases()
    assert len(found) == len(set(found)) == len(sweep.FAMILIES) * len(sweep.METHODS) * 3 + 4
    assert sweep.cases(["BEiT"]) == [("BEiT", method, format) for method in sweep.METHODS for format in sweep.FORMATS]
    assert ("DeiT", "tome", "executorch") in found


def test_it_goes_on_where_it_ended(sweep: Any, tmp_path: Path) -> None:
    path, seen = tmp_path / "new" / "sweep.csv", []

    def run(case: Any, models: Any) -> dict[str, Any]:
        seen.append(case)
        if case.format == "openvino":
            raise lp.RuntimeUnavailableError("not installed")
        if case.method == "topk":
            raise KeyboardInterrupt
        return {"result": "ok", "graph": "native", "max_relative_error": "1.0e-06"}

    wanted = [case for case in sweep.cases(["DeiT"], []) if case.method in ("pomt", "topk")]
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(path, wanted, float("inf"), run)
    assert [row["format"] for row in sweep.read_table(path)] == ["torch-export", "onnx"]
    assert sweep.sweep(path, wanted, float("-inf"), run) == 4  # no time left: nothing begins
    seen.clear()
    done = lambda case, models: seen.append(case) or {"result": "failed", "reason": "no kernel"}  # noqa: E731
    assert sweep.sweep(path, wanted, float("inf"), done) == 0
    assert seen == wanted[2:]
    rows = sweep.read_table(path)
    assert [tuple(row[key] for key in ("family", "method", "format")) for row in rows] == wanted
    assert path.read_text().count("# torch: ") == 1
    assert sweep.sweep(tmp_path / "other.csv", wanted[2:3], float("inf"), run) == 1  # it is not installed: no row


def test_one_real_case(sweep: Any) -> None:
    models: dict[str, Any] = {}
    row = sweep.measure(sweep.Case("DeiT", "mixed", "torch-export"), models)
    assert (row["result"], row["graph"], row["schedule"]) == ("ok", "native", "topk 4, tome 4")
    assert float(row["max_relative_error"]) < 1e-4
    row = sweep.measure(sweep.Case("CaiT", "tome", "torch-export"), models)
    assert row["result"] == "not pruned"
    assert "token sizes" in row["reason"]


def test_the_table(sweep: Any) -> None:
    def row(method: str, format: str, result: str = "ok", graph: str = "native", reason: str = "") -> dict[str, str]:
        error = "1.0e-06" if result == "ok" else ""
        given = {"method": method, "format": format, "result": result, "graph": graph, "reason": reason}
        return {"family": "DeiT", "max_relative_error": error, "seconds": "2.5", **given}

    rows = [row("pomt", format) for format in sweep.FORMATS]
    rows += [row("topk", "torch-export"), row("topk", "onnx", graph="portable")]
    rows += [row("topk", "openvino", "failed", reason="no kernel")]
    rows += [row("tome", format, "not pruned", reason="sizes") for format in sweep.FORMATS]
    rows += [row("tome", "aotinductor"), row("pomt", "executorch", "failed", reason="no kernel")]
    head, _, family, *rest = sweep.markdown(rows).splitlines()
    assert head.startswith("| family | `pomt` | `pomt-nearest` | `topk` |")
    cells = [cell.strip() for cell in family.split("|")[1:-1]]
    assert cells[:2] == ["DeiT", "yes"]
    assert cells[2] == "not run"
    assert cells[3] == "yes in PyTorch; portable in ONNX Runtime; no (1) in OpenVINO"
    assert cells[5] == "not pruned (2)"
    assert cells[-1] == "1.0e-06"
    assert "| `aotinductor` | DeiT | `tome` | ok | 1.0e-06 | 2.5 |" in rest
    assert "| `executorch` | DeiT | `pomt` | failed (1) |  | 2.5 |" in rest
    assert rest[-2:] == ["1. no kernel", "2. sizes"]


def test_the_documentation_has_the_table_of_the_stored_results(sweep: Any) -> None:
    page = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    rows = sweep.read_table(RESULTS / "export_sweep.csv")
    keys = [(row["family"], row["method"], row["format"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert set(keys) <= set(sweep.cases())
    assert sweep.markdown(rows) in page, "renew the table: export_sweep.py --markdown"
