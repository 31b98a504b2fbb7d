"""The package as a whole: what it exports, what importing it costs, and who may import whom."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_prune

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(lightning_prune.__file__).parent
ROOT = Path(__file__).parent.parent

# The chain of CONTRIBUTING.md, left to right: a room imports rooms of a lower rank, and its own. `errors`, `files`,
# `patches` and `progress` are tools for all.
CHAIN = (
    {"errors"},
    {"device", "files", "patches", "progress"},
    {"schedule", "vocabulary"},
    {"keep_rates"},
    {"reduction"},
    {"patching"},
    {"profiling"},
    {"planning"},
    {"callbacks"},
    {"cli"},
    {"__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(CHAIN) for room in rooms}
# Every other room stands apart: it may look at all of the chain but the command line, and the mechanism (up to
# patching) may not look at it.


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; the package itself is "__init__"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported_rooms(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """The rooms of the package that a module imports, at any depth of its code, with the line."""
    package = ("lightning_prune", *name.split("."))
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] != "lightning_prune":
                continue
            if len(target) == 1:
                yield "__init__", node.lineno
            elif target[1] != "__version__":
                yield lightning_prune._HOME.get(target[1], target[1]).split(".")[0], node.lineno


def may_import(importer: str, imported: str) -> bool:
    if imported == "__init__":  # its lazy names would hide what is really imported
        return False
    if importer == imported:
        return True
    if importer not in RANK:
        return RANK.get(imported, 0) < RANK["cli"]
    if imported not in RANK:
        return RANK[importer] > RANK["patching"]
    return RANK[imported] < RANK[importer]


@pytest.mark.parametrize("name", lightning_prune.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(lightning_prune, name) is not None
    assert name in dir(lightning_prune)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lightning_prune' has no attribute 'prune_everything'"):
        _ = lightning_prune.prune_everything


def test_type_checkers_see_the_public_names() -> None:
    """Names resolve lazily; the TYPE_CHECKING block has to say the same as the table that does it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    blocks = [
        n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"
    ]
    seen = {
        alias.asname: (node.module or "").removeprefix("lightning_prune").removeprefix(".")
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # `import x as x` is what marks a re-export
    }
    assert seen == {**lightning_prune._HOME, **dict.fromkeys(lightning_prune._ROOMS, "")}


def test_import_is_cheap() -> None:
    """The command line answers --help at once, and a deployment that only patches never imports lightning."""
    code = "import sys, lightning_prune; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"torch", "torchvision", "lightning", "pytorch_lightning", "timm", "numpy", "matplotlib", "sklearn"}
    assert not heavy & set(done.stdout.split())


def test_deploying_needs_no_lightning(tmp_path: Path) -> None:
    """Loading a schedule, patching, running and unpatching imports neither lightning nor what only reports need."""
    lightning_prune.Schedule.single(depth=2, block=0, remove=5).save(tmp_path / "schedule.yaml")
    code = """
import sys, timm, torch
import lightning_prune as lp
model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
images = torch.randn(1, 3, 64, 64)
before = model(images)
with lp.patch(model, "pomt", lp.Schedule.load(sys.argv[1])):
    assert not torch.equal(model(images), before)
assert torch.equal(model(images), before)
heavy = {"lightning", "pytorch_lightning", "torchmetrics", "jsonargparse", "sklearn", "matplotlib", "transformers"}
print(sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "schedule.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in modules() if name != "__init__"])
def test_imports_run_one_way(name: str) -> None:
    room = name.split(".")[0]
    wrong = [
        f"line {line}: {other}" for other, line in imported_rooms(name, modules()[name]) if not may_import(room, other)
    ]
    assert not wrong, f"{name} imports against the direction schedule, reduction <- ... <- cli: {wrong}"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("reduction", "schedule", True),
        ("reduction", "patching", False),
        ("schedule", "reduction", False),
        ("callbacks", "planning", True),
        ("planning", "callbacks", False),
        ("patching", "report", False),
        ("callbacks", "report", True),
        ("report", "profiling", True),
        ("report", "cli", False),
        ("report", "metrics", True),
        ("report", "__init__", False),
        ("callbacks", "cli", False),
        ("__main__", "cli", True),
        ("planning", "__init__", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_imported_rooms_are_recognised(tmp_path: Path) -> None:
    module = tmp_path / "tap.py"
    module.write_text(
        "import torch\nimport lightning_prune.cli\nfrom lightning_prune import Plan, __version__\n"
        "from .blocks import x\nfrom ..errors import y\nfrom .. import report\n"
        "def f():\n    from ..planning.planner import plan\n"
    )
    rooms = [room for room, _ in imported_rooms("patching.tap", module)]
    assert sorted(rooms) == ["cli", "errors", "patching", "planning", "planning", "report"]


def test_callbacks_door_leads_to_the_package() -> None:
    """One set of files behind both paths; a copy would give two classes of each name."""
    door = ROOT / "callbacks"
    if (ROOT / "PKG-INFO").exists():  # an unpacked sdist, which carries no symlinks
        assert not door.exists()
    else:
        assert door.is_symlink()
        assert door.readlink() == Path("lightning_prune/callbacks")
        assert (door / "__init__.py").samefile(ROOT / "lightning_prune/callbacks/__init__.py")


def test_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lightning_prune.__version__"}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == lightning_prune.__version__


def test_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
