"""README.md, CONTRIBUTING.md and docs/: links lead somewhere, commands parse, figures are those of the result files."""

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
    assert len(found) == 3
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
