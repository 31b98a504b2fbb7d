"""README.md, CONTRIBUTING.md and docs/: links lead somewhere, commands parse, figures are those of the result files."""

import ast
import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers import ROOT
from lightning_prune.cli.main import run

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
REPOSITORY = "lightning-prune/lightning-prune"
FILE_LINK = re.compile(
    rf"https://(?:github\.com/{REPOSITORY}/(?:blob|tree|raw)|raw\.githubusercontent\.com/{REPOSITORY})/main/([\w./-]*[\w/-])"
)
SITE = "https://lightning-prune.github.io/lightning-prune/"
SITE_LINK = re.compile(rf"{SITE}([\w/-]*)(?:#([\w-]+))?")
SOURCES = [
    *PAGES,
    *(ROOT / name for name in ("mkdocs.yml", "pyproject.toml", "Makefile")),
    *sorted((ROOT / "lightning_prune").rglob("*.py")),
    *sorted((ROOT / "examples").rglob("*.py")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]
FIGURE = r"([+-][0-9.]+)"
CELL = re.compile(rf"{FIGURE} \({FIGURE} to {FIGURE}\)(?: at ([0-9.]+)x)?")


def anchors(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    included = re.findall(r'^--8<-- "(.*)"$', text, flags=re.MULTILINE)
    text = "\n".join([text, *((ROOT / name).read_text(encoding="utf-8") for name in included)])
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    objects = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)  # the site makes an anchor of each
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings} | {*objects}


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("lightning-prune "):
                    yield str(page.relative_to(ROOT)), line


def tables() -> Iterator[tuple[Path, list[list[str]]]]:
    """Result file -> the table below the comment that names it."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, body in re.findall(r"<!-- (\S+\.csv) -->\n((?:\|.*\n)+)", text):
            yield ROOT / name, [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_readme_is_short_and_its_links_work_on_pypi() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert LINK.findall(text) == []


def test_links_into_the_repository_and_the_site_lead_to_files_of_the_checkout() -> None:
    files, pages = 0, 0
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        for path in FILE_LINK.findall(text):
            assert (ROOT / path).exists(), f"{source.name}: {path}"
            files += 1
        for path, anchor in SITE_LINK.findall(text):
            assert path == "" or path.endswith("/"), f"{source.name}: {path}"
            page = next(
                (each for each in (DOCS / path / "index.md", DOCS / f"{path.rstrip('/')}.md") if each.is_file()), None
            )
            assert page is not None, f"{source.name}: {path}"
            assert not anchor or anchor in anchors(page), f"{source.name}: {path}#{anchor}"
            pages += 1
    assert files > 10
    assert pages > 10


def test_the_navigation_has_every_page() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from leaves(list(entry.values()))
        elif isinstance(entry, list):
            for each in entry:
                yield from leaves(each)

    listed = list(leaves(settings["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert settings["site_url"] == SITE
    assert settings["repo_url"].endswith(REPOSITORY)
    assert settings["theme"]["font"] is False  # a reader's browser loads nothing from elsewhere


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
    if words[0] == "export":  # plans nothing
        assert any(word in ("--schedule", "--prune.schedule") for word in words)


def test_tables_of_methods_have_the_figures_of_their_files() -> None:
    found = list(tables())
    assert len(found) == 7
    checked = 0
    for path, (head, _, *lines) in found:
        with path.open(encoding="utf-8") as file:
            rows = {row["variant"]: row for row in csv.DictReader(file)}
        for method, *cells in lines:
            for target, cell in zip(head[1:], cells, strict=True):
                name = re.match(r"`([^`]+)`", method)
                assert name, method
                variant = f"{name[1]} {target}"
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
