"""Rewrites the words of a command line for the parser."""

import json
import re
from itertools import takewhile
from math import isfinite

from lightning_prune.errors import ArgumentError

_LISTS = ("--methods", "--speedups", "--runtimes")
_FLAGS = ("--per_class", "--controls", "--resume", "--overwrite")  # a value may follow; alone they are true
_MAX_PLAIN_DROP = 0.1  # shares of accuracy from here on are taken for percentages whose sign was forgotten
_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)"


def parser_words(words: list[str]) -> list[str]:
    """Rewrites a command line for the parser.

    Hyphens in names of options become underscores. Several words after an option become a list, as in
    `--methods dense pomt tome`. `--budget` and `--max-drop` become the options of the objective, the first folder of
    `--exported` those of the model. A class of a model whose arguments are given becomes a class path. A switch without
    a value is true.

    Args:
        words: The command line after `lightning-prune`.

    Raises:
        ArgumentError: If a speed-up is not a number, or `--budget`, `--max-drop` or `--exported` has another form.

    Example:
        >>> from lightning_prune.cli.words import parser_words
        >>> parser_words(["compare", "--speedups", "1.5", "2", "--resume=false"])
        ['compare', '--speedups=["1.5", "2"]', '--resume=false']
        >>> parser_words(["compare", "--per-class"])
        ['compare', '--per_class=true']
        >>> parser_words(["plan", "--budget", "1.5x", "--prune.time-limit=20"])
        ['plan', '--prune.objective=LatencyBudget', '--prune.objective.speedup=1.5', '--prune.time_limit=20']
    """
    rewritten: list[str] = []
    position = 0
    while position < len(words):
        word, position = words[position], position + 1
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            word = name + equals + value
        following = list(takewhile(_is_value, words[position:]))
        if name in _LISTS:
            values = [value, *following] if equals else following
            if values and not values[0].startswith("[") and values != ["null"]:
                if name == "--speedups":
                    _check_speedups(values)
                position += len(following)
                word = f"{name}={json.dumps(values)}"
        elif name == "--exported":  # of several folders, the model is that of the first
            folders = [value, *following] if equals else following
            position += len(following)
            rewritten += _exported(folders)
            continue
        elif name in _SHORT_FORMS:
            if not equals:
                value, position = (following[0], position + 1) if following else ("", position)
            rewritten += _SHORT_FORMS[name](value)
            continue
        elif name in _FLAGS and not equals and not following:
            word = f"{name}=true"
        elif name == "--model.model" and any(each.startswith("--model.model.") for each in words):
            word = f"--model.model.class_path{equals}{value}"  # since the parser would take the path for a plain text
        rewritten.append(word)
    return rewritten


def values_of(words: list[str], option: str) -> list[str]:
    """The values of an option in a command line.

    Args:
        words: The command line, as it was typed or as `parser_words` rewrites it.
        option: Its name, without hyphens.
    """
    found: list[str] = []
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == f"__{option}" or (option == "config" and name == "-c"):
            following = list(takewhile(lambda each: not each.startswith("--"), words[index + 1 :]))
            found += [value] if equals else []
            found += following if f"--{option}" in (*_LISTS, "--exported") else following[: not equals]
    return found


def _budget(value: str) -> list[str]:
    match = re.fullmatch(_NUMBER + r"\s*(?:(x)|ms(?:@p(50|90))?)", value.strip().lower())
    if match is None:
        raise ArgumentError(
            f"`budget` must be a speed-up such as 1.5x, or a latency such as 12ms or 12ms@p90, got {value!r}."
        )
    unit = "speedup" if match[2] else "ms"
    words = ["--prune.objective=LatencyBudget", f"--prune.objective.{unit}={match[1]}"]
    return [*words, f"--prune.objective.percentile={match[3]}"] if match[3] else words


def _max_drop(value: str) -> list[str]:
    match = re.fullmatch(_NUMBER + r"\s*(%?)", value.strip().lower())
    if match is None:
        raise ArgumentError(f"`max_drop` must be a share such as 0.5% or 0.005, got {value!r}.")
    share = float(match[1]) / 100 if match[2] else float(match[1])
    if not match[2] and _MAX_PLAIN_DROP <= share < 1:  # 0.5 is hardly meant as a half
        raise ArgumentError(
            f"`max_drop` must have a percent sign, such as {match[1]}% or {100 * share:g}%, got {value!r}."
        )
    return ["--prune.objective=AccuracyBudget", f"--prune.objective.max_drop={share:.12g}"]


def _exported(folders: list[str]) -> list[str]:
    if not folders or not all(folders):
        raise ArgumentError("`exported` must be one or more folders that `export` wrote, got nothing.")
    if len(set(folders)) < len(folders):
        raise ArgumentError(f"`exported` must be different folders, got {' '.join(folders)}.")
    # The file is run as it is: it is pruned already.
    folder = json.dumps({"folder": folders[0]})
    return ["--model.model=lightning_prune.load_exported", f"--model.model_kwargs={folder}", "--prune.enabled=false"]


_SHORT_FORMS = {"--budget": _budget, "--max_drop": _max_drop}


def _check_speedups(values: list[str]) -> None:
    """Raises ArgumentError with a clearer message than that of the parser, which names Python's types."""
    for value in values:
        try:
            valid = isfinite(float(value))
        except ValueError:
            valid = False
        if not valid:
            raise ArgumentError(f"`speedups` must be finite numbers > 1, as in --speedups 1.25 2, got {value!r}.")


def _is_value(word: str) -> bool:
    """Whether a word is a value and not an option; negative numbers are values."""
    return not word.startswith("-") or word[1:2].isdigit() or word[1:2] == "."
