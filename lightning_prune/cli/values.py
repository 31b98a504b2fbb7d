"""Finds mistakes in the values of options of this package before anything heavy is imported.

The checks are those that the classes make of the same values later.
"""

import json
import re
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import partial
from typing import Any

from lightning_prune._utils.spec import Spec
from lightning_prune._utils.validation import check_above, check_between, check_half_open, check_name, check_speedups
from lightning_prune.cli.options import method_names, objective_options, runtime_names
from lightning_prune.cli.words import parser_words, values_of
from lightning_prune.errors import ArgumentError

_NUMBERS: dict[str, Callable[[str, object], None]] = {
    "ms": partial(check_above, minimum=0),
    "speedup": partial(check_above, minimum=1),
    "max_drop": partial(check_half_open, low=0, high=1),
    "confidence": partial(check_half_open, low=0.5, high=1),
    "alpha": partial(check_between, low=0, high=1),
}
"""Setting of an objective -> its check."""
_NONE = ("null", "None")


def mistake_in_values(words: list[str], objective: str = "") -> str | None:
    """The first mistake in the values of methods, objectives, speed-ups and runtimes, as an error message.

    Values in configuration files, and those of classes that are not of this package, are left to the parser.

    Args:
        words: The options of a command line.
        objective: The class of the objective that a configuration or the command line names; empty for none.

    Example:
        >>> from lightning_prune.cli.values import mistake_in_values
        >>> mistake_in_values(["--budget", "0.5x"])
        '`speedup` must be a finite number > 1, got 0.5.'
        >>> mistake_in_values(["--runtimes", "torch", "tortch"]).split(", got ")[1]
        "'tortch'. Did you mean 'torch'?"
    """
    try:
        rewritten = parser_words(words)
        for method in _of(rewritten, "prune.method", "methods"):
            _check_class("method", re.split(r"[+:]", method)[0], method_names())
        for named in _of(rewritten, "prune.objective", "prune.objective.class_path"):
            _check_class("objective", named, tuple(objective_options()))
            objective = named
        if not objective or objective.rpartition(".")[2] in objective_options():
            for name, check_number in _NUMBERS.items():
                for text in _of(rewritten, f"prune.objective.{name}", f"prune.objective.init_args.{name}"):
                    check_number(name, _number(text))
        for runtime in _of(rewritten, "prune.runtime", "runtimes"):
            check_name("runtime", Spec.of(runtime, "runtime").name, runtime_names(), runtime)
        speedups = _of(rewritten, "speedups")
        if speedups:
            check_speedups([_number(text) for text in speedups])
    except ArgumentError as error:
        return str(error)
    return None


def _of(words: list[str], *options: str) -> list[str]:
    """The values of some options; the items of lists, and none of what the parser has to read."""
    found: list[str] = []
    for value in (value for option in options for value in values_of(words, option)):
        items = _items(value)
        found += [value] if items is None else items
    return [value for value in found if value not in _NONE and not value.startswith(("{", "["))]


def _items(value: str) -> list[str] | None:
    """The items of a list in JSON, as `parser_words` writes it; None for anything else."""
    try:
        read = json.loads(value)
    except ValueError:
        return None
    return [str(item) for item in read] if isinstance(read, list) else None


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _check_class(argument: str, name: str, known: Collection[str]) -> None:
    """Raises ArgumentError for a plain name that is not known; import paths are left to the parser."""
    if re.fullmatch(r"[\w-]+", name) and name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ArgumentError(f"`{argument}` must be one of {', '.join(known)}, or a class, got {name!r}.{hint}")
