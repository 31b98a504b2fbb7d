"""Rewriting of the command line for the parser."""

import pytest

import lightning_prune as lp
from lightning_prune.cli.words import parser_words, values_of


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "--methods", "x", "y", "--b", "1"], ["a", '--methods=["x", "y"]', "--b", "1"]),
        (["--speedups", "1.5", "-2"], ['--speedups=["1.5", "-2"]']),
        (["--methods=[x,y]", "--speedups", "[1.5]"], ["--methods=[x,y]", "--speedups", "[1.5]"]),
        (["--methods", "--speedups"], ["--methods", "--speedups"]),
        (["--per-class", "--resume", "false"], ["--per_class=true", "--resume", "false"]),
        (
            ["--runtimes", "torch", "torch.compile:mode=blocks", "--resume=false"],
            ['--runtimes=["torch", "torch.compile:mode=blocks"]', "--resume=false"],
        ),
    ],
)
def test_words_after_a_list_option_become_a_list(words: list[str], expected: list[str]) -> None:
    assert parser_words(words) == expected


def test_short_options_and_negative_numbers_after_a_list() -> None:
    assert parser_words(["compare", "--methods", "pomt", "-c", "my.yaml"]) == [
        *("compare", '--methods=["pomt"]', "-c", "my.yaml")
    ]
    assert parser_words(["--methods=pomt", "tome"]) == ['--methods=["pomt", "tome"]']
    assert parser_words(["--methods=null"]) == ["--methods=null"]
    assert parser_words(["--speedups", "-1", "2"]) == ['--speedups=["-1", "2"]']


def test_an_exported_folder_becomes_the_model_and_is_not_pruned() -> None:
    expected = ["--model.model=lightning_prune.load_exported", '--model.model_kwargs={"folder": "my-out"}']
    for words in (["--exported", "my-out"], ["--exported=my-out"], ["--exported", "my-out", "other"]):
        assert parser_words(["validate", *words]) == ["validate", *expected, "--prune.enabled=false"]
    assert values_of(["validate", "--exported", "my-out", "other", "--data=x"], "exported") == ["my-out", "other"]


@pytest.mark.parametrize("folders", [[], ["a", "a"]])
def test_exported_folders_are_different_ones(folders: list[str]) -> None:
    with pytest.raises(lp.ArgumentError, match="`exported` must be"):
        parser_words(["validate", "--exported", *folders, "--output=x"])


@pytest.mark.parametrize("separator", ["-", "_"])
def test_hyphens_in_option_names_become_underscores(separator: str) -> None:
    option = f"--prune.time{separator}limit"
    assert parser_words(["plan", option, "3"]) == ["plan", "--prune.time_limit", "3"]
    assert parser_words([f"{option}=3", "--output=my-folder"]) == ["--prune.time_limit=3", "--output=my-folder"]
    assert parser_words(["--output", "my-folder", "-c", "my-file"]) == ["--output", "my-folder", "-c", "my-file"]


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        (["--budget", "1.5x"], ["LatencyBudget", "speedup=1.5"]),
        (["--budget=12ms"], ["LatencyBudget", "ms=12"]),
        (["--budget", "0.5 ms"], ["LatencyBudget", "ms=0.5"]),
        (["--max-drop", "0.5%"], ["AccuracyBudget", "max_drop=0.005"]),
        (["--max_drop=.01"], ["AccuracyBudget", "max_drop=0.01"]),
        (["--max_drop=50%"], ["AccuracyBudget", "max_drop=0.5"]),
    ],
)
def test_short_forms_become_an_objective(words: list[str], objective: list[str]) -> None:
    name, setting = objective
    expected = ["validate", f"--prune.objective={name}", f"--prune.objective.{setting}", "--seed_everything=1"]
    assert parser_words(["validate", *words, "--seed-everything=1"]) == expected


def test_a_budget_may_bound_the_90th_percentile() -> None:
    expected = ["--prune.objective=LatencyBudget", "--prune.objective.ms=12", "--prune.objective.percentile=90"]
    assert parser_words(["plan", "--budget=12ms@p90"]) == ["plan", *expected]
    with pytest.raises(lp.ArgumentError, match=r"`budget` must be .* got '1.5x@p90'"):
        parser_words(["plan", "--budget=1.5x@p90"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "fast"], "`budget` must be a speed-up such as 1.5x, or .* got 'fast'"),
        (["--budget", "1.5"], "`budget` must be .* got '1.5'"),
        (["--budget"], "`budget` must be .* got ''"),
        (["--max-drop", "half"], "`max_drop` must be .* got 'half'"),
        (["--max-drop", "-1%"], "`max_drop` must be .* got '-1%'"),
        (["--max-drop", "0.5"], "`max_drop` must have a percent sign, such as 0.5% or 50%, got '0.5'"),
    ],
)
def test_invalid_short_forms_are_rejected(words: list[str], message: str) -> None:
    with pytest.raises(lp.ArgumentError, match=message):
        parser_words(["validate", *words])
