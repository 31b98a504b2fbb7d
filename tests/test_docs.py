"""README.md, CONTRIBUTING.md and docs/: links lead somewhere, commands parse, figures are those of the result files."""

import ast
import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT
from lightning_prune.cli.main import run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
FIGURE = r"([+-][0-9.]+)"
CELL = re.compile(rf"{FIGURE} \({FIGURE} to {FIGURE}\)(?: at ([0-9.]+)x)?")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("lightning-prune "):
                    yield page.name, line


def tables() -> Iterator[tuple[Path, list[list[str]]]]:
    """Result file -> the table below the comment that names it."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, body in re.findall(r"<!-- (\S+\.csv) -->\n((?:\|.*\n)+)", text):
            yield ROOT / name, [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_commands_parse(
    page: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command, comments=True)[1:] if not word.startswith("--print_config")]
    with pytest.raises(SystemExit) as stop:
        run([*words, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "model:" in printed
    assert "prune:" in printed


def test_tables_of_methods_have_the_figures_of_their_files() -> None:
    found = list(tables())
    assert len(found) == 6
    checked = 0
    for path, (head, _, *lines) in found:
        with path.open(encoding="utf-8") as file:
            rows = {row["variant"]: row for row in csv.DictReader(file)}
        for method, *cells in lines:
            for target, cell in zip(head[1:], cells, strict=True):
                variant = f"{method.strip('`')} {target}"
                if cell in ("", "not reached"):
                    assert not cell or variant not in rows
                    continue
                match = CELL.fullmatch(cell.replace("\u2212", "-"))
                assert match, cell
                row = rows[variant]
                columns = ("top1_change", "top1_low", "top1_high")
                assert match.groups()[:3] == tuple(f"{100 * float(row[column]):+.1f}" for column in columns), variant
                assert match[4] is None or match[4] == f"{float(row['speedup']):.2f}", variant
                checked += 1
    assert checked > 60


def private_names() -> Iterator[tuple[str, str]]:
    """Private names of other libraries in the package: attributes, keys and names of attributes, and imports."""
    own: set[str] = set()
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "lightning_prune").rglob("*.py")}
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            own |= {node.attr} if node.value.id in ("self", "cls") else set()
        elif isinstance(node, ast.Dict):  # the attributes of a class that is made by `type`
            own |= {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}
    own |= {"_utils", "_asdict", "_replace", "_fields"}
    private = re.compile(r"_[a-z][A-Za-z_]*")
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name | ast.Attribute):
                called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                place = {"getattr": 1, "hasattr": 1, "pop": 0, "get": 0}.get(called)
                argument = node.args[place] if place is not None and place < len(node.args) else None
                names = (
                    [argument.value] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []
                )
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                names = [str(node.slice.value)]
            elif isinstance(node, ast.ImportFrom):
                names = (node.module or "").split(".")
            for name in names:
                if private.fullmatch(name) and name not in own:
                    yield name, str(path.relative_to(ROOT / "lightning_prune"))


def test_private_names_of_other_libraries_are_in_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    found = set(private_names())
    assert ("_pytree", "_utils/trees.py") in found
    missing = {(name, path) for name, path in found if not any(name in line and path in line for line in lines)}
    assert not missing
    for line in lines:
        _, names, files, _, tests, _ = line.split("|")
        for path in re.findall(r"`([^`]+\.py)`", files):
            assert (ROOT / "lightning_prune" / path).is_file(), path
        for path in re.findall(r"`([^`]+\.py)`", tests):
            assert (ROOT / "tests" / path).is_file(), path
        private = re.findall(r"\b(_[a-z]\w*)", names)
        assert not private or any(name in private for name, _ in found), f"no longer used: {names}"
