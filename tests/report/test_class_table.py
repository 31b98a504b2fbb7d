"""The classes that lose most: at most five of each variant, the worst first, and what too few images cannot tell."""

from pathlib import Path
from typing import Any

from lightning_prune.report.class_table import losing_classes
from lightning_prune.report.html_page import write_page
from lightning_prune.report.tables import remarks

from .made_up import comparison
from .test_html_page import HOSTILE, Page


def class_of(name: str, change: float, half: float = 0.01) -> dict[str, Any]:
    return {"name": name, "images": 50, "change": change, "low": change - half, "high": change + half}


CLASSES = {
    "pomt 1.1x": [class_of(str(n), -n / 100, 0.035) for n in range(8)],
    "tome 1.1x": [class_of("0", 0.0), class_of(HOSTILE, 0.02)],
    "random 2x": [],
}
DOCUMENT = {**comparison(), "classes": CLASSES}


def test_at_most_five_that_lose_the_worst_first() -> None:
    pomt, tome, unknown = losing_classes(DOCUMENT)
    assert [(each.name, each.change, each.is_certain) for each in pomt.losing] == [
        *(("7", -0.07, True), ("6", -0.06, True), ("5", -0.05, True), ("4", -0.04, True), ("3", -0.03, False))
    ]
    assert (tome.classes, tome.losing, unknown.classes, unknown.losing) == (2, (), 0, ())
    assert losing_classes(comparison()) == []


def test_the_report_has_their_table_and_the_terminal_a_line(tmp_path: Path) -> None:
    page = Page(write_page(DOCUMENT, tmp_path).read_text())
    start = next(number for number, row in enumerate(page.rows) if row[:2] == ["class", "images"])
    rows = [[" ".join(cell.split()) for cell in row] for row in page.rows[start + 1 : start + 9]]
    assert rows[0] == ["pomt 1.1x"]
    assert rows[1] == ["7", "50", "\u22127.00", "\u221210.50 to \u22123.50", ""]
    assert rows[5] == ["3", "50", "\u22123.00", "\u22126.50 to +0.50", "too few images to tell"]
    assert rows[6:] == [["tome 1.1x: none of 2 classes loses"], ["random 2x: the classes cannot be compared"]]
    assert "script" not in {tag for tag, _ in page.tags}
    (line,) = (line for line in remarks(DOCUMENT) if "pomt 1.1x: 7" in line)
    assert "7 (-7.00 on 50 images), " in line
    assert "3 (-3.00 on 50 images, too few images to tell)" in line


def test_a_hostile_name_is_text(tmp_path: Path) -> None:
    page = Page(write_page({**DOCUMENT, "classes": {"pomt 1.1x": [class_of(HOSTILE, -0.1)]}}, tmp_path).read_text())
    assert HOSTILE in page.text
    assert "script" not in {tag for tag, _ in page.tags}
