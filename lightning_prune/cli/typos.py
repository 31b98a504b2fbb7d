"""Finds mistakes in the names of commands, options and keys before anything heavy is imported."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from lightning_prune._utils.files import user_path
from lightning_prune.cli.options import (
    DATA_CLASSES,
    EVERYWHERE,
    FREE,
    SHORT_FORMS,
    data_options,
    groups_of,
    names_of,
    objective_options,
)
from lightning_prune.cli.usage import COMMANDS, OWN_PARSERS
from lightning_prune.cli.values import mistake_in_values
from lightning_prune.cli.words import values_of

_LISTS = ("methods", "speedups", "runtimes", "exported")  # options with several words as values
_CLASS = ("class_path", "init_args", "dict_kwargs", "help")  # keys of any class
_VALUES_MAY_FOLLOW = ("print_config",)


def mistake_in(words: list[str]) -> str | None:
    """The first mistake in the names and values of a command line, as an error message; None if there is none.

    What depends on classes that are not of this package is left to the parser.

    Args:
        words: The command line after `lightning-prune`.

    Example:
        >>> from lightning_prune.cli.typos import mistake_in
        >>> mistake_in(["vaildate"]).split(", got ")[1]
        "'vaildate'. Did you mean validate?"
        >>> mistake_in(["validate", "--prune.time-limt=3"])
        'Unknown option --prune.time-limt. Did you mean --prune.time_limit?'
    """
    command, *rest = words
    if command.startswith("-"):
        return None
    if command not in COMMANDS:
        return f"`command` must be one of {', '.join(COMMANDS)}, got {command!r}.{_meant(command, COMMANDS, '')}"
    if command in OWN_PARSERS:
        return _mistake_in_own(rest, OWN_PARSERS[command])
    paths = values_of(rest, "config")
    classes = [_classes_in(_mapping(path)) for path in paths]
    data, objective = (
        ([found[place] for found in classes] + values_of(rest, key) + values_of(rest, f"{key}.class_path") or [""])[-1]
        for place, key in enumerate(("data", "prune.objective"))
    )
    known = _known(command, data, objective)
    for name, written in _options(rest):
        if name is None:
            hint = f" Did you mean --config {written}?" if written.endswith((".yaml", ".yml")) else ""
            return f"Unknown argument {written!r}: values follow an option.{hint}"
        if not _is_known(name, known):
            return f"Unknown option --{written}.{_meant(name, _all_names(known), '--')}"
    mistake = mistake_in_values(rest, objective)
    if mistake:
        return mistake
    for path in paths:
        mistake = _mistake_in_config(path, known)
        if mistake:
            return mistake
    return None


def missing_in(words: list[str]) -> str | None:
    """What a command needs and the command line does not give, as an error message; None if nothing is missing.

    Where a configuration cannot be read, that is left to the parser.

    Args:
        words: The command line after `lightning-prune`, without a mistake.

    Example:
        >>> from lightning_prune.cli.typos import missing_in
        >>> missing_in(["plan", "--model.model=vit_tiny_patch16_224"]).split(", got ")[0]
        '`data` must be DigitsData, ImageFolderData, ImageTableData, or the import path of a LightningDataModule'
    """
    command, *rest = words
    if command not in COMMANDS or command in OWN_PARSERS:
        return None
    given = {name.partition(".")[0] for name, _ in _options(rest) if name is not None}
    for path in values_of(rest, "config"):
        content = _mapping(path)
        if not content:
            return None
        inner = content.get(command)
        given |= {*content, *(inner if isinstance(inner, Mapping) else ())}
    if given & {"data", "print_config"}:
        return None
    return f"`data` must be {', '.join(DATA_CLASSES)}, or the import path of a LightningDataModule, got none."


def _mistake_in_own(words: list[str], options: tuple[str, ...]) -> str | None:
    """The first unknown option of a command that has its own parser; an option may be shortened."""
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and not any(each.startswith(name) for each in (*options, "--help")):
            return f"Unknown option {word}.{_meant(name[2:], [each[2:] for each in options], '--')}"
    return None


def _known(command: str, data: str, objective: str) -> dict[str, set[str] | None]:
    """Group -> its keys; None if all keys may be in it. What stands alone is a group without keys."""
    groups = groups_of(command)
    known: dict[str, set[str] | None] = {name: set(names_of(groups[name])) for name in ("prune", "model", "trainer")}
    known |= dict.fromkeys((*names_of(groups[""]), *EVERYWHERE, *FREE, *SHORT_FORMS, "help"))
    return known | _of_classes(data, objective)


def _of_classes(data: str, objective: str) -> dict[str, set[str] | None]:
    """The keys of a data class and of an objective; None for those that are not of this package."""
    options, ours = data_options(data), objective_options()
    kinds = ours.values() if not objective else [ours[name] for name in [objective.rpartition(".")[2]] if name in ours]
    fields = {name for fields in kinds for name in names_of(fields)}
    return {
        "data": {*names_of(options), *_CLASS} if options else None,
        "prune.objective": {*fields, *_CLASS} if fields else None,
    }


def _is_known(name: str, known: Mapping[str, set[str] | None]) -> bool:
    head, *rest = name.split(".")
    if head not in known:
        return False
    if rest[:1] == ["init_args"]:
        rest = rest[1:]
    keys = known[head]
    if not rest or keys is None or rest[-1] == "help":
        return True
    if rest[0] not in keys:
        return False
    inner = known.get(f"{head}.{rest[0]}")
    return len(rest) == 1 or inner is None or rest[1] in inner


def _all_names(known: Mapping[str, set[str] | None]) -> list[str]:
    inner = [f"{group}.{key}" for group, keys in known.items() for key in sorted((keys or set()) - {*_CLASS})]
    return [name for name in known if "." not in name and name not in FREE] + inner


def _meant(name: str, names: Iterable[str], prefix: str) -> str:
    """A hint at the name that was probably meant, in the same group if a group is named."""
    group, _, end = name.replace(".init_args", "").rpartition(".")
    names = list(names)
    siblings = {each.rpartition(".")[2]: each for each in names if each.rpartition(".")[0] == group}
    anywhere = {each.rpartition(".")[2]: each for each in names}
    others = {} if siblings else {each: each for each in names}  # a common group makes any two names similar
    for known, written in ((siblings, end), (others, name), (anywhere, end)):
        close = difflib.get_close_matches(written, known, n=1, cutoff=0.7)
        if close:
            return f" Did you mean {prefix}{known[close[0]]}?"
    return ""


def _options(words: list[str]) -> Iterator[tuple[str | None, str]]:
    """The options in a command line: name with underscores and as it is written; no name for a word out of place."""
    values = 0.0  # that may follow the last option
    for word in words:
        if word.startswith("--") and len(word) > 2:
            written, equals, _ = word[2:].partition("=")
            name = written.replace("-", "_").rstrip("+")
            values = 0 if equals else 1
            values = float("inf") if name in _LISTS or name in _VALUES_MAY_FOLLOW else values
            yield name, written
        elif word in ("-c", "-h"):
            values = 1 if word == "-c" else 0
        elif values:
            values -= 1
        else:
            yield None, word


def _mapping(path: str) -> dict[str, Any]:
    """The content of a configuration file; empty if the parser has to say what is wrong with it."""
    try:
        content = yaml.safe_load(user_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) and all(isinstance(key, str) for key in content) else {}


def _classes_in(content: Mapping[str, Any]) -> tuple[str, str]:
    """The classes of data and objective that a configuration names; empty if it names none."""
    prune = content.get("prune")
    values = (content.get("data"), prune.get("objective") if isinstance(prune, Mapping) else None)
    found = [value.get("class_path") if isinstance(value, Mapping) else value for value in values]
    data, objective = (each if isinstance(each, str) else "" for each in found)
    return data, objective


def _mistake_in_config(path: str, known: Mapping[str, set[str] | None]) -> str | None:
    """The first key of a configuration file that no command has."""
    everywhere = {
        name for command in COMMANDS if command not in OWN_PARSERS for name in names_of(groups_of(command)[""])
    }
    content = _mapping(path)
    known = {**known, **dict.fromkeys([*everywhere, *COMMANDS]), **_of_classes(*_classes_in(content))}
    for key in _keys(content):
        if not _is_known(key, known):
            return f"Unknown key {key} in {path}.{_meant(key, _all_names(known), '')}"
    return None


def _keys(content: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The dotted keys of a configuration down to those of an objective."""
    for key, value in content.items():
        name = f"{prefix}{str(key).rstrip('+')}"
        yield name
        if isinstance(value, Mapping) and depth < 3:
            # Arguments of a class are written with and without `init_args`.
            inner = prefix if key == "init_args" else f"{name}."
            yield from _keys(value, inner, depth + 1)
