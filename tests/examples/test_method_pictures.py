"""The pictures of the documentation can be drawn again, and those in docs/pictures are used and small."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers import ROOT
from lightning_prune.reduction import METHODS

PICTURES = ROOT / "docs" / "pictures"


def test_pictures_are_drawn(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = program("method_pictures")
    monkeypatch.setattr(module, "LEARNED_FROM", 8)
    monkeypatch.setattr(module, "THRESHOLDS", (0.1,))
    monkeypatch.setattr(module, "REMOVED", (52,))
    monkeypatch.setattr(sys, "argv", ["method_pictures.py", "--output", str(tmp_path), "--only", "resize", "vwt-inter"])
    module.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["method_resize.png", "method_vwt-inter.png"]


def test_a_committed_picture_is_made_small(program: Any, tmp_path: Path) -> None:
    module = program("method_pictures")
    source = module.RESULTS / module.COPIES["digits_profile"]
    small = module.made_small(source, tmp_path / "small.png")
    with Image.open(source) as before, Image.open(small) as after:
        assert after.width == min(before.width, 900)
        assert abs(after.height / after.width - before.height / before.width) < 0.01
    assert small.stat().st_size < source.stat().st_size


def test_every_method_has_a_picture_on_the_page_of_methods(program: Any) -> None:
    drawn = program("method_pictures").METHODS
    assert sorted(drawn) == sorted([*METHODS, "pomt-nearest"])
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert not [method for method in drawn if f"(pictures/method_{method}.png)" not in text]


def test_pictures_are_used_and_small() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for picture in PICTURES.iterdir():
        assert f"pictures/{picture.name})" in text, picture.name
        assert picture.stat().st_size < 100_000, picture.name


def test_the_figures_of_methods_are_those_of_the_benchmarks() -> None:
    cells = re.compile(r"^\| (.*) \|$", flags=re.MULTILINE)
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    expected: dict[tuple[str, str], list[str]] = {}
    for batch, body in re.findall(r"cifar10_cpu/batch_(\d+)/results\.csv -->\n((?:\|.*\n)+)", benchmarks):
        for line in cells.findall(body):
            method, *values = line.split(" | ")
            expected[method.strip("`"), batch] = values
    checked = 0
    for section in re.split(r"^### ", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        method = section.split("\n", 1)[0]
        for line in cells.findall(section):
            label, *values = line.split(" | ")
            if label.startswith("batch "):
                assert values == expected[method, label.removeprefix("batch ")], (method, label)
                checked += 1
    assert checked == len([key for key in expected if key[0] not in ("auto", "method")])
