"""The programs of `examples/benchmarks` run and write what they say; what they measure is not looked at."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_prune.cli.words import parser_words


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    module.main()


def rows_of(program: Any, path: Path) -> list[dict[str, str]]:
    text = path.read_text()
    for name in ("device", "threads", "torch", "timm", "lightning_prune", "date", "command"):
        assert f"# {name}: " in text
    rows: list[dict[str, str]] = program("tables").read_table(path)
    return rows


def test_floor(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--models", "deit_tiny_patch16_224", "--batch-sizes", "1", "--precisions", "fp32"]
    words += ["--cases", "pomt", "tome, four blocks", "--rounds", "2", "--trace", "--device", "cpu"]
    run(program("floor"), monkeypatch, *words, "--output", str(tmp_path))
    rows = rows_of(program, tmp_path / "floor.csv")
    assert [(row["precision"], row["case"], row["removed"], row["limit"]) for row in rows] == [
        *(("fp32", "pomt", "56", "1.02"), ("fp32", "tome, four blocks", "96", "1.05"))
    ]
    assert (tmp_path / "floor.png").stat().st_size > 10_000
    assert "aten::" in (tmp_path / "trace_deit_tiny_patch16_224_fp32_1_tome.txt").read_text()


def test_the_floor_of_a_schedule_does_what_the_model_does_on_as_many_tokens(program: Any) -> None:
    """With nothing removed it is the model; with a method that keeps the first tokens it would be the patched one."""
    import torch

    floor = program("floor")
    model, images = floor.prepare("deit_tiny_patch16_224", "fp32", 1, "cpu")
    seen: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.inference_mode():
        assert torch.equal(floor.floor_forward(model, images, {}, tail=False), model(images))
        seen.clear()
        floor.floor_forward(model, images, {3: 56, 5: 10}, tail=False)
    assert seen == [197] * 3 + [141] * 2 + [131] * 7


def test_the_floor_is_compiled_as_the_patched_model_is(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    floor, commands = program("floor"), []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: commands.append(options) or forward)
    model, images = floor.prepare("deit_tiny_patch16_224", "fp32", 1, "cpu")
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    forwards = floor.contenders(model, images, "pomt", "reduce-overhead")
    assert commands == [{"mode": "reduce-overhead", "dynamic": False}] * 3
    assert {name: value.data_ptr() for name, value in forwards["pruned"].state_dict().items()} == before
    with torch.inference_mode():
        assert torch.equal(forwards["dense"](images), model(images))
        assert torch.equal(forwards["floor"](images), floor.floor_forward(model, images, {3: 56}, tail=True))
        assert not torch.equal(forwards["pruned"](images), model(images))


@pytest.mark.long
def test_latency_of_a_dense_reader(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--model", "vit_tiny_patch16_224", "--sizes", "64", "--methods", "tome", "topk", "--modes", "eager"]
    run(program("dense_latency"), monkeypatch, *words, "onnxruntime", "--rounds", "3", "--output", str(tmp_path))
    rows = rows_of(program, tmp_path / "latency.csv")
    assert [(row["mode"], row["method"]) for row in rows] == [
        (mode, method) for mode in ("eager", "onnxruntime") for method in ("tome", "topk")
    ]
    assert {(row["patches"], row["removed"], row["rounds"]) for row in rows} == {("16", "6", "3")}


@pytest.mark.parametrize("mode", ["eager", pytest.param("onnxruntime", marks=pytest.mark.long)])
def test_what_is_timed_for_a_dense_reader_is_the_patched_model(program: Any, mode: str) -> None:
    import torch

    import lightning_prune as lp

    timed = program("dense_latency")
    model, images = program("dense").build("vit_tiny_patch16_224", 64, False, None), torch.randn(1, 3, 64, 64)
    schedule = timed.schedule_of(12, 16, 0.15)
    assert schedule.removed == (0, 0, 0, 0, 2, 0, 2, 0, 2, 0, 0, 0)
    forwards = timed.contenders(model, images, ["topk"], schedule, mode)
    with torch.inference_mode():
        dense = model(images)
        with lp.patch(model, "topk", schedule, restore="auto"):
            expected = {"dense": dense, "topk": model(images)}
        assert not torch.allclose(expected["topk"][-1], dense[-1], rtol=1e-3, atol=1e-4)
        for name, forward in forwards.items():
            for found, right in zip(forward(images), expected[name], strict=True):
                torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)


def test_scaling(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--sizes", "112", "--batch-sizes", "1", "2", "--depths", "4", "--rounds", "2", "--device", "cpu"]
    run(program("scaling"), monkeypatch, *words, "--output", str(tmp_path))
    (patches,) = rows_of(program, tmp_path / "by_patches.csv")
    assert (patches["patches"], patches["removed"]) == ("49", "15")
    assert [row["batch"] for row in rows_of(program, tmp_path / "by_batch.csv")] == ["1", "2"]
    (depth,) = rows_of(program, tmp_path / "by_depth.csv")
    assert float(depth["in_proportion_to_tokens"]) == pytest.approx(1 - (3 - 1 / 3) / 4 * 59 / 197, abs=1e-4)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.long
def test_profile_cost(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cost = program("profile_cost")
    words = ["--simulated", "2", "--model", "vit_tiny_patch16_224", "--size", "64", "--device", "cpu"]
    run(cost, monkeypatch, *words, "--output", str(tmp_path))
    simulated = rows_of(program, tmp_path / "simulated.csv")
    assert len(simulated) == 2
    assert all(int(row["runs"]) < int(row["exhaustive_runs"]) / 2 for row in simulated)
    assert all(float(row["utility_gap_percent"]) < 1 for row in simulated)
    (real,) = rows_of(program, tmp_path / "real.csv")
    assert int(real["exhaustive_counts"]) == 15  # 2 to 16 tokens and dense
    assert (tmp_path / "batch_1.png").stat().st_size > 10_000


def test_methods_benchmark_runs_the_compare_command(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    methods = program("methods")
    commands: list[list[str]] = []
    monkeypatch.setattr(methods, "run", lambda words: commands.append(words) or 3)
    with pytest.raises(SystemExit, match="3"):
        run(methods, monkeypatch, "--speedups", "1.5", "--output", str(tmp_path), "--prune.time_limit", "5")
    assert commands[0][:4] == ["compare", "--config", "configs/digits.yaml", "--methods"]
    assert "auto" in commands[0]
    assert commands[0][-6:] == ["--speedups", "1.5", "--output", str(tmp_path), "--prune.time_limit", "5"]
    assert "--methods" in " ".join(parser_words(commands[0]))


def test_all_runs_every_one_and_says_which_failed(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything = program("all")
    commands: list[list[str]] = []

    class Done:
        def __init__(self, command: list[str], check: bool) -> None:
            commands.append(command)
            self.returncode = int("scaling" in command[1])

    monkeypatch.setattr(everything.subprocess, "run", Done)
    with pytest.raises(SystemExit, match="Failed: scaling"):
        run(everything, monkeypatch, "--output", str(tmp_path), "--quick", "--device", "cpu")
    assert [Path(command[1]).stem for command in commands] == ["floor", "profile_cost", "scaling", "methods"]
    for command in commands:
        assert Path(command[1]).is_file()
        assert command[3] == str(tmp_path / Path(command[1]).stem)
    assert commands[-1][4:6] == ["--trainer.accelerator", "cpu"]


@pytest.mark.long
def test_runtimes(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm

    tiny = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=64).eval()
    tiny.pretrained_cfg = {**tiny.pretrained_cfg, "input_size": (3, 64, 64)}
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: tiny)
    words = ["--runtimes", "onnxruntime", "--speedups", "1.1", "--block", "0", "--seconds", "0.3", "--clock", "cpu"]
    run(program("runtimes"), monkeypatch, *words, "--output", str(tmp_path))
    rows = rows_of(program, tmp_path / "runtimes.csv")
    assert [(row["runtime"], row["planned_on"]) for row in rows] == [
        ("onnxruntime", "torch"),
        ("onnxruntime", "onnxruntime"),
    ]
    assert all(2 <= int(row["left"]) < 17 for row in rows)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.long
def test_deployment(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm

    tiny = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=64).eval()
    tiny.pretrained_cfg = {**tiny.pretrained_cfg, "input_size": (3, 64, 64)}
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: tiny)
    deployment, commands = program("deployment"), []
    monkeypatch.setattr(deployment, "CASES", {"topk": ("topk", {0: 12}, 1.02), "exact": ("exact", {}, 1.02)})
    monkeypatch.setattr(deployment, "run", lambda words: commands.append(words) or 3)
    words = ["--runtimes", "torch", "onnxruntime:quantize=static", "--batch-sizes", "2", "--seconds", "0.2"]
    words += ["--accuracy", "configs/digits.yaml", "--trainer.limit_val_batches", "3", "--clock", "cpu"]
    run(deployment, monkeypatch, *words, "--output", str(tmp_path))
    rows = rows_of(program, tmp_path / "deployment.csv")
    assert [(row["runtime"], row["case"]) for row in rows] == [
        (runtime, case) for runtime in ("torch", "onnxruntime:quantize=static") for case in ("dense", "topk", "exact")
    ]
    assert all(int(row["rounds"]) >= 3 and float(row["ms"]) > 0 for row in rows)
    assert [row["over_own"] for row in rows[::3]] == ["1.0", "1.0"]
    assert [row["over_dense"] == "" for row in rows] == [False] * 3 + [True] * 3  # no float32 in that runtime
    assert float(rows[0]["over_eager"]) == 1.0
    (command,) = commands
    assert command[command.index("--runtimes") + 1 : command.index("--prune.time_limit")] == ["torch", "onnxruntime"]
    assert command[-2:] == ["--trainer.limit_val_batches", "3"]
    assert command[command.index("--data.batch_size") + 1] == "2"
    assert "--methods" in " ".join(parser_words(command))
