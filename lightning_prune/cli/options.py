"""The options of the commands, read from the source of the functions that they belong to.

Neither torch nor Lightning is imported, so that help and mistakes cost no seconds. `tests/cli/test_options.py` compares
the options with those of the parser.
"""

import ast
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).parents[1]
_OBJECTIVES = ("AccuracyBudget", "LatencyBudget", "Utility")
DATA_CLASSES = {"DigitsData": "datamodules", "ImageFolderData": "datamodules", "ImageTableData": "image_table"}
_PASSED_BY_CODE = ("self", "model", "dataloaders", "datamodule")
SHORT_FORMS = ("budget", "max_drop", "exported")
"""Options that `lightning_prune.cli.words` rewrites."""
EVERYWHERE = {
    "config": "a YAML file with these keys; later files and options take precedence",
    "print_config": "print the configuration and stop; skip_default leaves out defaults",
    "seed_everything": "seed of all random generators",
}
"""Options of every command."""
FREE = ("optimizer", "lr_scheduler")
"""Keys of LightningCLI with any class."""


class Option(NamedTuple):
    """An option.

    Attributes:
        name: Its name, without the group.
        default: Its default as text; empty if it has none, or None.
        text: What it is for.
    """

    name: str
    default: str
    text: str


@cache
def groups_of(command: str) -> dict[str, tuple[Option, ...]]:
    """The options of a command by group; those of the command itself under `""`.

    Args:
        command: `"validate"`, `"compare"` and so on.
    """
    own = _PACKAGE / "cli" / "trainer.py"
    found = signature(own, "PruneTrainer", command) or signature(_lightning_trainer(), "Trainer", command)
    return {
        "": found,
        "prune": signature(_PACKAGE / "callbacks" / "token_pruning.py", "TokenPruning"),
        "model": signature(_PACKAGE / "classification" / "image_classifier.py", "ImageClassifier"),
        "trainer": signature(_lightning_trainer(), "Trainer"),
    }


@cache
def data_options(name: str) -> tuple[Option, ...]:
    """The options of a data class of this package, by its name or import path; none for another class."""
    name = name.rpartition(".")[2]
    if name not in DATA_CLASSES:
        return ()
    return signature(_PACKAGE / "classification" / f"{DATA_CLASSES[name]}.py", name)


@cache
def objective_options() -> dict[str, tuple[Option, ...]]:
    """The options of each objective."""
    return {name: signature(_PACKAGE / "planning" / "objectives.py", name) for name in _OBJECTIVES}


@cache
def method_names() -> tuple[str, ...]:
    """The names of methods: of this package, those that other packages declare, `auto`, `dense`, `exact` and `int8`."""
    found = {"auto", "dense", "exact", "int8", "pomt-nearest"}
    for path in (_PACKAGE / "reduction").glob("*.py"):
        for node in (n for kind in _parsed(path).body if isinstance(kind, ast.ClassDef) for n in kind.body):
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id == "name" and isinstance(value, ast.Constant):
                found.add(str(value.value))
    found |= {point.name for point in entry_points(group="lightning_prune.reductions")}
    return tuple(sorted(found))


@cache
def runtime_names() -> tuple[str, ...]:
    """The names of runtimes, the keys of `lightning_prune.runtimes.RUNTIMES`, and those of other packages."""
    added = [each.name for each in entry_points(group="lightning_prune.runtimes")]
    for node in _parsed(_PACKAGE / "runtimes" / "registry.py").body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "RUNTIMES":
            return tuple(dict.fromkeys([*(ast.literal_eval(node.value) if node.value is not None else ()), *added]))
    return ()


def signature(path: Path, kind: str, method: str = "__init__") -> tuple[Option, ...]:
    """The arguments of a method, or the fields of a dataclass, with their texts in the docstring.

    Args:
        path: The source.
        kind: The class.
        method: The method; the docstring of `__init__` is that of the class.

    Returns:
        None of them if there is no such class or method.
    """
    found = next((n for n in _parsed(path).body if isinstance(n, ast.ClassDef) and n.name == kind), None)
    if found is None:
        return ()
    function = next((n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == method), None)
    if function is None and method != "__init__":
        return ()
    documented = found if method == "__init__" and ast.get_docstring(found) else function
    texts = _texts(ast.get_docstring(documented) or "") if documented is not None else {}
    if documented is found and function is not None:
        texts = {**_texts(ast.get_docstring(function) or ""), **texts}
    if function is None:
        annotated = [n for n in found.body if isinstance(n, ast.AnnAssign)]
        own = [n for n in annotated if not ast.unparse(n.annotation).startswith("ClassVar")]
        pairs = [(n.target.id, n.value) for n in own if isinstance(n.target, ast.Name) and n.target.id[0] != "_"]
    else:
        arguments = function.args
        missing = len(arguments.args) - len(arguments.defaults)
        values = [*[None] * missing, *arguments.defaults, *arguments.kw_defaults]
        pairs = [(a.arg, value) for a, value in zip((*arguments.args, *arguments.kwonlyargs), values, strict=True)]
    return tuple(
        Option(name, _text_of(default), texts.get(name, ""))
        for name, default in pairs
        if (name not in _PASSED_BY_CODE and name[0] != "_") or (kind == "ImageClassifier" and name == "model")
    )


def _text_of(default: ast.expr | None) -> str:
    """A default as it is written on a command line."""
    if default is None or (isinstance(default, ast.Constant) and default.value is None):
        return ""
    if isinstance(default, ast.Constant) and isinstance(default.value, str | bool):
        return str(default.value).lower() if isinstance(default.value, bool) else default.value
    return ast.unparse(default)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])


@cache
def _lightning_trainer() -> Path:
    """The source of Lightning's Trainer; finding a package at the top does not import it."""
    spec = importlib.util.find_spec("lightning")
    root = Path(spec.origin).parent if spec is not None and spec.origin else Path("nowhere")
    return root / "pytorch" / "trainer" / "trainer.py"


def _texts(docstring: str) -> dict[str, str]:
    """The texts of the arguments in a docstring in Google style."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    found: dict[str, list[str]] = {}
    name = ""
    for line in section[1].splitlines() if section else ():
        begin = re.match(r"    (\w+)(?: \([^)]*\))?: ?(.*)", line)
        if begin:
            name = begin[1]
            found[name] = [begin[2]]
        elif name and line.strip():
            found[name].append(line.strip())
    return {name: " ".join(filter(None, lines)).replace("``", "`") for name, lines in found.items()}


def names_of(options: Iterable[Option]) -> list[str]:
    """The names of options."""
    return [option.name for option in options]
