"""The command `doctor`: what it prints, for people and for programs."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from lightning_prune.__main__ import main
from lightning_prune._utils.readings import NotReadable
from lightning_prune.cli import models_command
from lightning_prune.cli.typos import mistake_in
from lightning_prune.patching.models.support import SupportStatus

REPORT = {
    "system": {"lightning_prune": "0.1.0", "total_gib": 15.5},
    "variables": {"OMP_NUM_THREADS": "1"},
    "state": {"turbo": NotReadable("no such file"), "gpus": [{"name": "G", "watts": 3.0}, {"name": "H", "watts": 4.0}]},
    "noise": {"1 thread": {"ms": 9.5, "rounds": 7, "verdict": f"Noisy: {'x' * 90} 8.1%."}},
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    timings: list[bool] = []

    def report(timing: bool) -> dict[str, Any]:
        timings.append(timing)
        print("said by a library")
        return REPORT

    monkeypatch.setattr("lightning_prune.profiling.installation_report.machine_report", report)
    return timings


def test_tables_fit_into_80_columns(made: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert made == [True]
    assert max(map(len, lines)) <= 80
    assert "said by" not in printed
    assert [line for line in lines if not line.startswith(" ")] == list(REPORT)
    words = {line.split("  ")[1].strip(): line.rpartition("  ")[2].strip() for line in lines if line.startswith("  ")}
    assert words["total"] == "15.5 GiB"
    assert words["OMP_NUM_THREADS"] == "1"
    assert words["turbo"] == "not readable: no such file"
    assert "8.1%." in printed
    assert "name = G, watts 3; name = H, watts 4" in printed


def test_json(made: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--no_timing"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert made == [False]
    assert read["system"] == REPORT["system"]
    assert read["state"]["turbo"] == {"not_readable": "no such file"}
    assert read["noise"]["1 thread"]["rounds"] == 7


def test_without_a_torch_that_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "lightning_prune.profiling.installation_report":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert main(["doctor", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["versions"]["torch"]
    assert "torchvision::nms" in read["torch"]["all"]["not_readable"]


@pytest.mark.parametrize("line", ["doctor", "doctor --json", "models vit_tiny*", "models --markdown"])
@pytest.mark.usefixtures("made")
def test_a_reader_that_has_ended(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = SupportStatus("vit_tiny_patch16_224", "VisionTransformer", "yes", "")
    monkeypatch.setattr(models_command, "isotropic_names", lambda: [status.name] * 999)
    monkeypatch.setattr(models_command, "support_of", lambda name: status)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(line.split()) == 0
        stream.flush()  # as Python does when it ends
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("docter", "doctor"),
        ("doctor --jsn", "--json"),
        ("doctor --no-timming", "--no-timing"),
        ("models --markdwon", "--markdown"),
    ],
)
def test_mistakes(line: str, meant: str) -> None:
    found = mistake_in(line.split())
    assert found is not None
    assert found.endswith(f"Did you mean {meant}?")


@pytest.mark.parametrize("line", ["doctor --json --no-timing", "doctor --no_timing", "doctor --no", "doctor --help"])
def test_no_mistakes(line: str) -> None:
    assert mistake_in(line.split()) is None


def test_help_needs_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lightning_prune", "doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--no-timing" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "timm", "numpy", "lightning"}


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    home = tmp_path / "somebody"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "LIGHTNING_PRUNE_CACHE"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prune", "doctor", "--json"],
        env={**environment, "PYTHONPATH": paths, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert str(home) not in done.stdout
    read = json.loads(done.stdout)
    assert read["noise"]["1 thread, wall clock"]["ms"] > 0
    assert read["folders"]["cache"].startswith("~")
