"""The house: which files there are, what they are called, and who may import whom. CONTRIBUTING.md says why."""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent

# A file imports files of its own room and of the rooms before it. The loose files are rooms of their own.
ORDER = (
    "errors",
    "_utils",
    "schedule",
    "reduction",
    "patching",
    "runtimes",
    "profiling",
    "quantization",
    "planning",
    "report",
    "exporting",
    "callbacks",
    "comparison",
    "cli",
    "__main__",
)
RANK = {room: rank for rank, room in enumerate(ORDER)}
# Rooms that stand apart from the order, with what they may import and who may import them.
APART = {
    "metrics": ({"errors", "_utils", "profiling"}, {"classification", "comparison", "cli"}),
    "classification": ({*ORDER[: RANK["profiling"] + 1], "metrics"}, {"exporting", "comparison", "cli", "__main__"}),
}
LOOSE = {"__init__", "__main__", "errors", "schedule"}
SAME_NAME = {"__init__", "api", "base", "registry"}  # these mean the same in every room

# What does not follow the rules yet. An entry that follows them fails, so that it is taken out.
UPWARD: set[tuple[str, str]] = set()
CIRCLES: set[frozenset[str]] = set()
OWN_PACKAGE: set[str] = set()
FUNCTION_NAMES: set[str] = set()


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; a package goes by its own name, the root by the empty one."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: tuple[str, ...], tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Every import of this package in a file, at any depth: the module (dotted, without the root) and the name.

    Args:
        package: Dotted name of the package that the file is in, root included, for relative imports.
        tree: Of the file.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root, _, module = alias.name.partition(".")
                if root == "lightning_prune":
                    yield module, None
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            whole = (*base, *(node.module or "").split(".")) if node.module else base
            if whole and whole[0] == "lightning_prune":
                for alias in node.names:
                    yield ".".join(whole[1:]), alias.name


class Imports:
    """The import graph of files: names that a package re-exports count as imports of the file that defines them.

    Attributes:
        files: Importing file -> imported files.
        own_package: Files that import the `__init__` of a package that they are in.
        root: Files that import the package's root, whose names are resolved lazily.
    """

    def __init__(self, paths: dict[str, Path]) -> None:
        self._packages = {name for name, path in paths.items() if path.name == "__init__.py"}
        self._paths = paths
        trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
        found = {name: list(imports(self._package_of(name), tree)) for name, tree in trees.items()}
        self._exported = {
            name: {as_name: module for module, as_name in found[name] if as_name} for name in self._packages
        }
        self.files: dict[str, set[str]] = {name: set() for name in paths if name not in self._packages}
        self.own_package: set[str] = set()
        self.root: set[str] = set()
        for name in self.files:
            for module, imported in found[name]:
                if (module, imported) == ("", "__version__"):
                    continue
                if module == "" and imported not in paths:
                    self.root.add(name)
                target = self._resolve(module, imported)
                if module in self._packages - {""} and name.startswith(f"{module}."):
                    submodule = f"{module}.{imported}" in paths and imported not in self._exported[module]
                    self.own_package |= set() if submodule else {name}
                if target not in self._packages and target != name:
                    self.files[name].add(target)

    def _package_of(self, name: str) -> tuple[str, ...]:
        parts = ("lightning_prune", *filter(None, name.split(".")))
        return parts if name in self._packages else parts[:-1]

    def _resolve(self, module: str, name: str | None) -> str:
        """The file that defines a name; the module itself where that is not known."""
        if name is None:
            return module
        inside = f"{module}.{name}" if module else name
        seen = set()
        while module in self._packages and module not in seen and name in self._exported[module]:
            seen.add(module)
            module = self._exported[module][name]
        return inside if inside in self._paths and not seen else module


def room(name: str) -> str:
    return name.split(".")[0]


def may_import(importer: str, imported: str) -> bool:
    """Whether files of one room may import files of another."""
    if importer == imported:
        return True
    if importer in APART:
        return imported in APART[importer][0]
    if imported in APART:
        return importer in APART[imported][1]
    return RANK[imported] < RANK[importer]


MODULES = modules()


@pytest.fixture(scope="module")
def graph() -> Imports:
    """Of the package; each process that runs tests reads this file, and one of them has to read all the others."""
    return Imports(MODULES)


def test_every_file_is_in_a_room() -> None:
    rooms = {room(name) for name in MODULES if name}
    assert rooms <= {*ORDER, *APART}
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == LOOSE


def test_imports_run_downwards(graph: Imports) -> None:
    upward = {(a, b) for a, found in graph.files.items() for b in found if not may_import(room(a), room(b))}
    assert upward == UPWARD


def test_no_import_circle(graph: Imports) -> None:
    assert circles(graph.files) == CIRCLES


def test_no_file_imports_its_own_package(graph: Imports) -> None:
    """A name is imported from the file that defines it: through the package it would be a circle."""
    assert graph.own_package == OWN_PACKAGE
    assert graph.root == set()


def test_names_of_files(graph: Imports) -> None:
    names = defaultdict(set)
    for name in graph.files:
        names[name.rpartition(".")[2]].add(name)
    assert {stem: where for stem, where in names.items() if len(where) > 1 and stem not in SAME_NAME} == {}
    assert names.keys() & sys.stdlib_module_names == set()


def test_no_module_is_called_like_a_function(graph: Imports) -> None:
    """`import package.module` would give the function once the package exports it."""
    found = set()
    for name, path in MODULES.items():
        functions = {
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        package = name if name in graph._packages else name.rpartition(".")[0]
        found |= {f"{package}.{function}".lstrip(".") for function in functions} & MODULES.keys()
    assert found == FUNCTION_NAMES


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of files that all import each other, directly or by way of others."""
    reached = {name: reach(graph, name) for name in graph}
    together = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph}
    return {circle for circle in together if circle}


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """All files that a file imports, directly or by way of others; itself only where it is in a circle."""
    found: set[str] = set()
    left = set(graph[start])
    while left:
        name = left.pop()
        found.add(name)
        left |= graph.get(name, set()) - found
    return found


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("reduction", "schedule", True),
        ("schedule", "reduction", False),
        ("patching", "report", False),
        ("report", "planning", True),
        ("planning", "report", False),
        ("callbacks", "report", True),
        ("report", "callbacks", False),
        ("metrics", "profiling", True),
        ("metrics", "planning", False),
        ("profiling", "metrics", False),
        ("classification", "metrics", True),
        ("classification", "planning", False),
        ("callbacks", "classification", False),
        ("cli", "classification", True),
        ("callbacks", "cli", False),
        ("__main__", "cli", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_imports_are_recognised(tmp_path: Path) -> None:
    """Lazy, relative, aliased and type-checking imports all count; names lead to the file that defines them."""
    files = {
        "": "from lightning_prune.a.one import X as X\n",
        "a": "from lightning_prune.a.one import X\n",
        "a.one": "import torch\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..b import two\n",
        "b": "from lightning_prune.a import X as X\n",
        "b.two": "def f():\n    from lightning_prune.b import X\n    import lightning_prune.c.three as t\n",
        "c": "",
        "c.three": "from lightning_prune import X, __version__\nfrom .four import Y\n",
        "c.four": "from lightning_prune import c\n",
    }
    paths = {}
    for name, text in files.items():
        package = name in {"", "a", "b", "c"}
        paths[name] = tmp_path / name.replace(".", "/") / "__init__.py" if package else tmp_path / f"{name}.py"
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_text(text)
    graph = Imports(paths)
    assert graph.files == {
        "a.one": {"b.two"},
        "b.two": {"a.one", "c.three"},
        "c.three": {"a.one", "c.four"},
        "c.four": set(),
    }
    assert circles(graph.files) == {frozenset({"a.one", "b.two", "c.three"})}
    assert graph.own_package == {"b.two"}
    assert graph.root == {"c.three"}
