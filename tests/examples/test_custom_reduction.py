"""The example of a user's own reduction."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import lightning_prune as lp
from helpers.fresh import run_fresh
from lightning_prune.reduction import TokenSequence, resolve

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "custom_reduction.py"


def test_example_runs() -> None:
    done = run_fresh("import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')", str(EXAMPLE))
    assert done.returncode == 0, done.stderr
    left = ", ".join(["197"] * 3 + ["141"] * 9)
    assert done.stdout == f"Norm(): logits (2, 1000), tokens ({left})\n"


def test_example_keeps_the_patch_tokens_of_largest_norm() -> None:
    method = runpy.run_path(str(EXAMPLE))["Norm"]()
    x = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
    reduced = method.reduce(TokenSequence(x, 1, True), 4)
    for b in range(3):
        longest = sorted(range(1, 12), key=lambda i: x[b, i].norm().item(), reverse=True)[:7]
        assert reduced.positions[b].tolist() == [0, *sorted(longest)]


def test_entry_point_of_the_docstring_registers_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section, line = re.findall(
        r'^    (\[project\.entry-points."(?:.*)"\]|norm = .*)$', EXAMPLE.read_text(), re.MULTILINE
    )
    group, value = re.search('"(.*)"', section), re.search('"(.*)"', line)
    assert group is not None
    assert value is not None
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "reductions.py").write_text(EXAMPLE.read_text())
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group[1]}]\nnorm = {value[1]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("norm").name == "norm"
    assert type(resolve("norm")).__module__ == "my_package.reductions"
    with pytest.raises(lp.ArgumentError, match="Did you mean 'norm'"):
        resolve("nrom")
