"""Wrong values of options: found before torch is imported, in the words of the class that would refuse them later."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import lightning_prune as lp
from helpers import ROOT
from lightning_prune._utils.validation import check_speedups
from lightning_prune.cli.options import objective_options, runtime_names
from lightning_prune.cli.typos import mistake_in
from lightning_prune.cli.values import _NUMBERS
from lightning_prune.cli.words import parser_words
from lightning_prune.runtimes import RUNTIMES, parse_runtime


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("plan --budget 12xx", lambda: parser_words(["--budget", "12xx"])),
        ("plan --max-drop=half", lambda: parser_words(["--max-drop", "half"])),
        ("plan --budget 0.5x", lambda: lp.LatencyBudget(speedup=0.5)),
        ("plan --budget=0ms", lambda: lp.LatencyBudget(ms=0.0)),
        ("validate --max-drop 200%", lambda: lp.AccuracyBudget(2.0)),
        ("validate --prune.objective.confidence=1", lambda: lp.AccuracyBudget(confidence=1.0)),
        ("plan --prune.objective Utility --prune.objective.alpha 2", lambda: lp.Utility(2.0)),
        ("plan --prune.objective.init_args.alpha=high", lambda: lp.Utility("high")),  # type: ignore[arg-type] # wrong on purpose
        ("compare --speedups 1.5 0.5", lambda: check_speedups([1.5, 0.5])),
        ("compare --speedups=1.5 1.5", lambda: check_speedups([1.5, 1.5])),
        ("compare --speedups 1.5 two", lambda: parser_words(["--speedups", "two"])),
        ("compare --runtimes torch tortch", lambda: parse_runtime("tortch")),
        ("plan --prune.runtime=torch.compil:mode=blocks", lambda: parse_runtime("torch.compil:mode=blocks")),
        ("plan --prune.runtime torch.compile:mode", lambda: parse_runtime("torch.compile:mode")),
    ],
)
def test_a_wrong_value_is_refused_in_the_words_of_its_class(line: str, refused: Callable[[], Any]) -> None:
    with pytest.raises(lp.ArgumentError) as error:
        refused()
    assert mistake_in(line.split()) == str(error.value)


def test_an_objective_that_is_none_is_named_with_what_was_meant() -> None:
    found = mistake_in(["plan", "--prune.objective", "LatencyBuget"])
    assert found is not None
    assert found.endswith("got 'LatencyBuget'. Did you mean 'LatencyBudget'?")


@pytest.mark.parametrize(
    "line",
    [
        "plan --prune.objective mine.Goal --prune.objective.speedup 0.5",
        "plan --prune.objective.speedup null --prune.objective.ms=1e1 --prune.runtime torch.compile:mode=blocks",
        'compare --speedups [1.5,2] --methods=["tome"] --runtimes=null',
        "compare --speedups 1.5 2 --methods tome pomt+int8 --per-class --max-drop 0%",
    ],
)
def test_what_is_valid_or_not_ours_is_left_to_the_parser(line: str) -> None:
    assert mistake_in(line.split()) is None


def test_the_names_are_those_of_the_source() -> None:
    assert runtime_names() == tuple(RUNTIMES)
    fields = {option.name for options in objective_options().values() for option in options}
    assert set(_NUMBERS) == fields - {"percentile"}


def test_mistakes_cost_no_import_of_torch() -> None:
    code = """
import sys
sys.argv = ["lightning-prune"]
from lightning_prune.__main__ import main
for line in sys.stdin.read().splitlines():
    assert main(line.split()) == 2, line
print(sorted({"torch", "lightning", "numpy", "timm"} & set(sys.modules)))
"""
    lines = ["plan --budget 12xx", "plan --max-drop 200%", "compare --speedups 0.5", "compare --runtimes tortch"]
    lines += ["compare --methods pmot", "plan --prune.objective LatencyBuget", "plan --prune.objective.alpha 2"]
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
    assert done.stderr.count("error: ") == len(lines)
