"""`bundle`, and what becomes of it: measured without torch, planned on, exported and run."""

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import DIGITS_MODEL, digits_module, tiny_vit
from helpers.refusing import ONLY_PYTHON, run_refusing
from lightning_prune.__main__ import main
from lightning_prune.callbacks import TokenPruning
from lightning_prune.cli.trainer import PruneTrainer
from lightning_prune.exporting import bundle_profile
from lightning_prune.exporting.bundle_graphs import bundled_graphs
from lightning_prune.exporting.device_bundle import MEASURING_FILES
from lightning_prune.profiling import InterleavedTimer

PACKAGE = Path(lp.__file__).parent
IMAGES = noise_images(1)
SHAPE = {"depth": 1, "embed_dim": 16, "num_heads": 2}
TINY = [
    f"--model.model={DIGITS_MODEL}",
    "--model.pretrained=false",
    f"--model.model_kwargs={json.dumps(SHAPE)}",
    "--data=DigitsData",
    "--data.init_args.batch_size=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=4",
    "--prune.calibration=8",
    "--prune.verbose=false",
]
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def module() -> Any:
    return digits_module(shape=SHAPE)


@pytest.fixture(scope="module")
def small(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for ONNX Runtime, as the command writes it."""
    folder = tmp_path_factory.mktemp("small") / "bundle"
    pruner = TokenPruning("topk", block="auto", verbose=False)
    trainer = PruneTrainer(callbacks=[pruner], **QUIET)
    made = trainer.bundle(module, datamodule=lp.DigitsData(batch_size=2), output=str(folder))
    assert (made.folder, made.runtime, made.methods, made.tokens) == (folder, "onnxruntime", ("topk",), 197)
    assert made.megabytes == pytest.approx(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6)
    return folder


def check_files(folder: Path) -> None:
    for name in MEASURING_FILES:
        assert (folder / "measuring" / "lightning_prune" / name).read_bytes() == (PACKAGE / name).read_bytes()
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert b"site-packages" not in path.read_bytes(), path
            assert str(PACKAGE.parent).encode() not in path.read_bytes(), path


def run_without_torch(folder: Path) -> lp.LatencyProfile:
    ran = run_refusing(ONLY_PYTHON, folder / "profile.py", "--time-limit=0.5", "--threads=1")
    assert (ran.returncode, "Traceback" in ran.stderr) == (0, False), ran.stderr
    assert "lightning-prune plan --config my.yaml --profile profile.json" in ran.stdout
    profile = lp.LatencyProfile.load(folder / "profile.json")
    assert len(profile.tokens) >= 4  # dense and three counts, whatever the time
    assert min(profile.rounds) >= 3
    assert (profile.method, profile.block, profile.depth, profile.protocol) == ("random", 0, 1, "deployed")
    assert {probe.method for probe in profile.probes} == {"topk"}
    assert all(sum(probe.removed) > 0 and probe.depth_ratio == 1 for probe in profile.probes)
    expected = {"threads": 1, "device_type": "cpu", "clock": "wall"}
    assert {key: profile.context[key] for key in expected} == expected
    assert profile.context["device"]
    return profile


@pytest.mark.long
def test_from_the_device_to_the_exported_model(small: Path, tmp_path: Path) -> None:
    """By the commands: measured without torch, planned here for there, exported, and run without torch."""
    check_files(small)
    described = json.loads((small / "bundle.json").read_text())
    assert (described["shape"], described["tokens"], described["depth"]) == ([2, 1, 56, 56], 197, 1)
    assert "--format onnx" in (small / "README.md").read_text()
    profile = run_without_torch(small)
    assert (profile.context["runtime"], profile.context["batch_size"]) == ("onnxruntime", 2)
    assert profile.context["onnxruntime"] == version("onnxruntime")
    options = ["--prune.method=topk", "--prune.block=auto", "--max-drop=90%"]
    words = [*options, f"--profile={small / 'profile.json'}", f"--output={tmp_path / 'plan'}"]
    assert main(["plan", *TINY, *words]) == 0
    made = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert made["latency_ms"] == made["predicted_ms"]
    assert all(each["measured_ratio"] is None for each in made["front"])
    schedule = lp.Schedule.load(tmp_path / "plan" / "schedule.yaml")
    assert schedule.made_on is not None
    assert schedule.made_on.device == profile.context["device"]
    words = [f"--schedule={tmp_path / 'plan' / 'schedule.yaml'}", f"--output={tmp_path / 'out'}"]
    assert main(["export", *TINY, *words]) == 0
    ran = run_refusing(ONLY_PYTHON, tmp_path / "out" / "run.py")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.long
def test_a_device_with_openvino(tmp_path: Path) -> None:
    model, folder = tiny_vit(depth=1), tmp_path / "bundle"
    lp.bundle(model, folder, IMAGES, runtime="openvino:precision=f32", methods=["topk"], verbose=False)
    check_files(folder)
    assert {path.suffix for path in (folder / "graphs").iterdir()} == {".xml", ".bin"}
    assert "--format openvino" in (folder / "README.md").read_text()
    profile = run_without_torch(folder)
    assert (profile.context["runtime"], profile.context["runtime_precision"]) == ("openvino", "f32")


def device(folder: Path, *words: str) -> tuple[int, lp.LatencyProfile | None]:
    """Runs `profile.py` of a bundle in this process."""
    output = folder / "profile.json"
    output.unlink(missing_ok=True)
    status = bundle_profile.main(folder, [f"--output={output}", *words])
    return status, lp.LatencyProfile.load(output) if output.exists() else None


@pytest.fixture
def runs_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes a run take 1 ms a token, or 200 ms where a method reduces; Ctrl-C comes after some runs."""

    def set_end(end: int) -> None:
        left = [end]

        def once(self: Any, alternative: int | str) -> float:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return 1e-3 * (alternative if isinstance(alternative, int) else 197 if alternative == "dense" else 200)

        monkeypatch.setattr(InterleavedTimer, "once", once)

    return set_end


@pytest.mark.all_rounds
@pytest.mark.parametrize("end", [40, 60])
def test_interrupted_it_keeps_what_is_measured(
    small: Path, end: int, runs_until: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    runs_until(end)
    status, profile = device(small, "--time-limit=0.2")
    assert status == 130
    assert profile is not None
    assert profile.dense_tokens == 197
    assert len(profile.tokens) >= 4
    assert [profile.latency_ms(count) for count in profile.tokens] == pytest.approx(list(profile.tokens))
    assert "Interrupted: " in capsys.readouterr().err


def test_interrupted_during_the_overheads_it_keeps_the_curve(
    small: Path, runs_until: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: Any, alternatives: Any, *arguments: Any, **keywords: Any) -> int:
        if self.reference == "dense":
            raise KeyboardInterrupt
        return original(self, alternatives, *arguments, **keywords)

    original = InterleavedTimer.measure
    runs_until(10**6)
    monkeypatch.setattr(InterleavedTimer, "measure", measure)
    status, profile = device(small, "--time-limit=0.2")
    assert (status, profile is not None and profile.probes) == (130, ())


def test_interrupted_at_once_it_writes_nothing(
    small: Path, runs_until: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    runs_until(4)
    assert device(small) == (130, None)
    assert "nothing is written" in capsys.readouterr().err


def test_a_plan_uses_the_overheads_and_times_nothing(
    small: Path, module: Any, runs_until: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_until(10**6)
    _, profile = device(small, "--time-limit=0.2")
    assert profile is not None
    assert [probe.ratio for probe in profile.probes] == pytest.approx([200 / 197] * 2)
    monkeypatch.setattr(InterleavedTimer, "once", None)  # nothing may be timed here
    images = torch.randn(8, 1, 56, 56, generator=torch.Generator().manual_seed(0))
    objective = lp.AccuracyBudget(0.9)

    def planned(profile: lp.LatencyProfile, method: str) -> lp.Plan:
        return lp.plan(
            module, images[:2], calibration=images, methods=method, objective=objective, profile=profile,
            time_limit=5, verbose=False, use_cache=False, tail=False,  # the only block is the last
        )  # fmt: skip

    with_overhead = planned(profile, "topk")
    without = planned(replace(profile, probes=()), "topk")
    assert with_overhead.pruned is None
    assert with_overhead.predicted_ms > without.predicted_ms + 10
    assert "measured by a bundle" in with_overhead.reason
    assert "predicted from it, not measured" in with_overhead.reason
    assert "no overhead of" not in with_overhead.reason
    assert "no overhead of topk" in without.reason
    assert "no overhead of pomt" in planned(profile, "pomt").reason


def test_cpu_time_is_said(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, profile = device(small, "--time-limit=0.2", "--threads=1", "--clock=cpu")
    assert status == 0
    assert profile is not None
    assert profile.context["clock"] == "cpu"
    assert "CPU time in ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--provider=NoSuchProvider"], "`provider` must be one of .*CPUExecutionProvider.*, got 'NoSuchProvider'"),
        (["--output=profile.yaml"], "`output` must be a .json file, got profile.yaml"),
    ],
)
def test_bad_options(small: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert device(small, *words) == (2, None)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)


@pytest.mark.parametrize("words", [["--time-limit=0"], ["--threads=x"], ["--threads=1.5"], ["--clock=sun"]])
def test_options_that_are_no_numbers(small: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        device(small, *words)


def test_a_changed_bundle_is_refused(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = shutil.copytree(small, tmp_path / "bundle")
    graph = copied / "graphs" / "tokens.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    assert device(copied)[0] == 2
    assert f"{graph} was changed" in capsys.readouterr().err
    graph.unlink()
    assert device(copied)[0] == 2
    assert f"{graph} must be there" in capsys.readouterr().err
    (copied / "bundle.json").write_text('{"format": "other", "version": 1, "files": {}}')
    assert device(copied)[0] == 2
    assert "must be a lightning_prune.bundle file" in capsys.readouterr().err


def test_without_the_runtime(small: Path) -> None:
    ran = run_refusing((*ONLY_PYTHON, "onnxruntime"), small / "profile.py")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert "pip install onnxruntime" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_folder_that_exists_is_kept(small: Path) -> None:
    before = (small / "bundle.json").read_bytes()
    with pytest.raises(lp.ArgumentError, match="`output` must be a new or empty folder"):
        lp.bundle(tiny_vit(depth=1), small, IMAGES, methods="topk")
    assert (small / "bundle.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"runtime": "torch"}, lp.ArgumentError, "`runtime` must be .*, got 'torch', which needs torch"),
        ({"runtime": "onnxruntim"}, lp.ArgumentError, "Did you mean 'onnxruntime'"),
        ({"methods": "tomee"}, lp.ArgumentError, "Did you mean 'tome'"),
        ({"example_inputs": IMAGES[0]}, lp.ArgumentError, "`example_inputs` must be images"),
        ({"overwrite": "yes"}, lp.ArgumentError, "`overwrite` must be True or False"),
        ({"model": torch.nn.Linear(2, 2)}, lp.UnsupportedModelError, "Linear"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    given = {"model": tiny_vit(depth=1), "example_inputs": IMAGES, "verbose": False, **arguments}
    with pytest.raises(error, match=message):
        lp.bundle(given.pop("model"), tmp_path / "out", given.pop("example_inputs"), **given)
    assert list(tmp_path.iterdir()) == []


def test_a_patched_model_is_refused(tmp_path: Path) -> None:
    model = tiny_vit(depth=1)
    with lp.patch(model, "topk", [4]), pytest.raises(lp.ArgumentError, match="`model` must be dense"):
        lp.bundle(model, tmp_path / "out", IMAGES)


def test_what_is_copied_imports_nothing_else() -> None:
    """Python's own modules, numpy, files that are copied, and inside of functions the runtimes and PyYAML."""
    copied = {"lightning_prune." + name.removesuffix(".py").replace("/", ".") for name in MEASURING_FILES}
    for name in (*MEASURING_FILES, "exporting/bundle_launcher.py"):
        tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            found += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            allowed = {"numpy", *sys.stdlib_module_names}
            allowed |= set() if node in tree.body else {"onnxruntime", "openvino", "yaml"}
            assert all(each in copied or each.partition(".")[0] in allowed for each in found), (name, found)


def test_the_graphs_compute_what_the_model_computes(small: Path, module: Any) -> None:
    described = bundle_profile.read_bundle(small)
    graphs = bundled_graphs(small, described, None, 1)
    model = module.model
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 1, 56, 56)).astype(np.float32))

    def check(expected: torch.Tensor) -> None:
        (found,) = graphs.run()
        torch.testing.assert_close(torch.from_numpy(found.numpy()), expected, rtol=1e-3, atol=1e-5)

    with torch.no_grad():
        graphs.to(described["curve"], 197)
        check(model(images))
        for probe in described["probes"]["graphs"]:
            graphs.to(probe["file"])
            with lp.patch(model, probe["method"], probe["removed"]):
                check(model(images))


def test_graphs_that_memory_does_not_hold_are_loaded_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.exporting.bundle_graphs._memory", lambda: 1.0)
    described = bundle_profile.read_bundle(small)
    graphs = bundled_graphs(small, described, None, 1)
    for count in (197, 120, 90, 70, 50, 197):
        graphs.to(described["curve"], count)
        assert graphs.run()
    assert [count for _, count in graphs._loaded] == [90, 70, 50, 197]
