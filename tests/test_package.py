"""The package as a whole: what it exports, what importing it costs, and what it is shipped with."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_prune
from helpers.fresh import run_fresh

PACKAGE = Path(lightning_prune.__file__).parent
ROOT = Path(__file__).parent.parent


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


def test_help_is_cheap() -> None:
    """The command line answers --help without torch. That importing the package imports no Lightning is tested with
    the demo models, which it registers with timm."""
    command = [sys.executable, "-X", "importtime", "-m", "lightning_prune", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "lightning_prune" in imported
    heavy = {"torch", "torchvision", "lightning", "pytorch_lightning", "timm", "numpy", "matplotlib", "sklearn"}
    assert not heavy & imported


def test_deploying_needs_no_lightning(tmp_path: Path) -> None:
    """Loading a schedule, patching, running and unpatching imports neither lightning nor what only reports need.

    torchao, which takes seconds to import, is imported when weights are quantized.
    """
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
lp.quantization.Int8Weights(model)
heavy = {"lightning", "pytorch_lightning", "torchmetrics", "jsonargparse", "sklearn", "matplotlib", "transformers"}
print(sorted(heavy.union(["torchao"]) & set(sys.modules)))
"""
    done = run_fresh(code, str(tmp_path / "schedule.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


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


def test_extra_all_covers_every_runtime_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (requirement,) = map(Requirement, extras["all"])
    assert requirement.name == project["name"]
    assert requirement.extras == set(extras) - {"all", "dev", "docs", "notebooks"}
    assert "lightning-prune[all]" in extras["dev"]  # the tests need all of them
