"""docs/api: every public name stands on one page, and nothing else does."""

import re
from collections import Counter
from importlib import import_module
from types import ModuleType

import lightning_prune as lp
from helpers import ROOT

PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
ENTRY = re.compile(r"^::: (\S+)$", flags=re.MULTILINE)

Key = tuple[str, int]  # a name, and the object that it is: one that stands in the root and in a subpackage counts once


def key(module: ModuleType, name: str) -> Key:
    return name, id(getattr(module, name))


def public() -> dict[Key, str]:
    rooms = {name: getattr(lp, name) for name in lp.__all__ if isinstance(getattr(lp, name), ModuleType)}
    found = {key(lp, name): f"lightning_prune.{name}" for name in lp.__all__ if name not in rooms}
    for room, module in rooms.items():
        found |= {key(module, name): f"lightning_prune.{room}.{name}" for name in module.__all__}
    return found


def documented() -> list[Key]:
    names = [name for page in PAGES for name in ENTRY.findall(page.read_text(encoding="utf-8"))]
    parts = [name.rpartition(".") for name in names]
    return [key(import_module(module), name) for module, _, name in parts]  # raises if there is no such name


def test_every_public_name_stands_on_one_page() -> None:
    expected, found = public(), Counter(documented())
    assert len(expected) > 100
    assert not [name for each, name in expected.items() if found[each] != 1]


def test_nothing_else_stands_there() -> None:
    assert not [name for name, identity in documented() if (name, identity) not in public()]


def test_every_subpackage_is_in_the_index() -> None:
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    rooms = [name for name in lp.__all__ if isinstance(getattr(lp, name), ModuleType)]
    assert not [room for room in rooms if f"`lp.{room}`" not in text]
