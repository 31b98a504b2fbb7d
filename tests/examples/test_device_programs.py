"""The programs for a GPU and for TensorRT, as far as they go without either: cases, limits, figures, and refusals."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit


@pytest.fixture
def gpu(program: Any) -> Any:
    return program("gpu")


@pytest.fixture
def engines(program: Any) -> Any:
    return program("tensorrt_engines")


class TestGpu:
    def test_cases_are_in_the_order_of_their_cost(self, gpu: Any) -> None:
        found = gpu.cases()
        assert len(found) == len(set(found)) == 2 * 3 * (3 * 2 + 1)  # ONNX Runtime has no bfloat16 here
        assert found[0] == ("deit_small_patch16_224", "fp32", 1, "eager")
        modes = [case.mode for case in found]
        assert list(dict.fromkeys(modes)) == list(gpu.MODES)
        assert modes == sorted(modes, key=gpu.MODES.index)
        quick = gpu.cases(quick=True)
        assert {case[:3] for case in quick} == {("deit_small_patch16_224", "fp32", batch) for batch in (1, 16)}
        assert gpu.cases(["eager"]) == [case for case in found if case.mode == "eager"]

    def test_a_cpu_is_refused(self, gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "out"), "--quick"])
        with pytest.raises(SystemExit, match=r"A CUDA device is needed, and torch .* finds none"):
            gpu.main()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.long
    def test_the_time_limit_and_failures(self, gpu: Any) -> None:
        """Each case takes 40 s, the second fails: the third has no time left, and a cheap mode still has."""
        now, written, deadlines = [0.0], [], []

        def measuring(case: Any, device: str, rounds: int, deadline: float) -> list[dict[str, Any]]:
            deadlines.append(deadline)
            now[0] += 40 if case.mode == "compile" else 1
            if case.batch == 16:
                raise RuntimeError("out of memory\nand more")
            return [{"variant": name, "ms": 1.0} for name in ("dense", "pomt")]

        wanted = [gpu.Case("m", "fp32", batch, "compile") for batch in (1, 16, 64)]
        wanted.append(gpu.Case("m", "fp32", 1, "eager"))
        rows = gpu.run_cases(
            wanted, "cpu", 3, 100.0, lambda found: written.append(len(found)), measuring, lambda: now[0]
        )
        assert [(row["mode"], row["batch"], row["status"]) for row in rows] == [
            ("compile", 1, "ok"),
            ("compile", 1, "ok"),
            ("compile", 16, "RuntimeError: out of memory"),
            ("compile", 64, "not measured: the limit of 100 s is reached"),
            ("eager", 1, "ok"),
            ("eager", 1, "ok"),
        ]
        assert written == [2, 3, 4, 6]
        assert deadlines == [25.0, 60.0, 100.0]  # each has its share of what is left
        assert all(set(gpu.COLUMNS) <= row.keys() for row in rows if row["status"] != "ok")

    @pytest.mark.all_rounds
    def test_what_is_measured(self, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """On the CPU with a tiny model: the variants, on the same weights; each pruned one over its own floor."""
        model = tiny_vit(depth=2, num_classes=5)
        monkeypatch.setattr(gpu.floor, "prepare", lambda *_: (model, noise_images(1)))
        one, four = {0: 4}, {0: 2, 1: 2}
        monkeypatch.setattr(gpu, "METHODS", {"pomt": one, "topk": one, "tome": four})
        monkeypatch.setattr(gpu, "FLOORS", {"floor, one cut": one, "floor, four cuts": four})
        rows = gpu.measure(gpu.Case("tiny", "fp32", 1, "eager"), "cpu", 7, float("inf"))
        assert [row["variant"] for row in rows] == list(gpu.VARIANTS)
        dense, pomt = rows[0], rows[1]
        assert (dense["over_dense"], dense["over_floor"], dense["rounds"]) == (1.0, "", 7)
        assert pomt["over_floor"] > 0.5
        assert pomt["images_per_second"] == pytest.approx(1e3 / pomt["ms"], rel=1e-2)
        found = gpu.modules(model)
        with torch.no_grad(), lp.patch(tiny_vit(depth=2, num_classes=5), "tome", [2, 2]) as handle:
            images = noise_images(1)
            assert torch.equal(found["tome"](images), handle.transformer.root(images))
            assert torch.equal(found["floor, one cut"](images), gpu.floor.floor_forward(model, images, one, tail=True))

    def test_a_table_can_be_written_of_any_rows(self, gpu: Any, tmp_path: Path, program: Any) -> None:
        rows = gpu.run_cases([gpu.Case("m", "fp32", 1, "eager")], "cpu", 1, 0.0, lambda found: None)
        program("tables").write_table(tmp_path / "gpu.csv", rows, {"device": "none"})
        (row,) = program("tables").read_table(tmp_path / "gpu.csv")
        assert row["status"] == "not measured: the limit of 0 s is reached"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> list[Path]:
    """Dense and pruned."""
    root, images = tmp_path_factory.mktemp("folders"), noise_images(2)
    model = tiny_vit(depth=1, num_classes=5, noise=0.3)
    for name, plan in (("dense", None), ("pruned", lp.Schedule([4], "tome"))):
        lp.export(model, root / name, images, plan=plan, format="onnx", rounds=0)
    return [root / "dense", root / "pruned"]


class FakeEngine:
    """Returns what the sample expects, times a factor; takes as long as it is told."""

    def __init__(self, images: Any, expected: Any, factor: float, milliseconds: float, now: list[float]) -> None:
        self.images, self.output = torch.empty_like(torch.from_numpy(images)), torch.from_numpy(expected) * factor
        self.milliseconds, self.now, self.build_seconds, self.bytes = milliseconds, now, 2.0, 2**20

    def run(self) -> torch.Tensor:
        self.now[0] += self.milliseconds / 1e3
        return self.output


class TestTensorRT:
    def test_rows_beside_dense(self, engines: Any, folders: list[Path]) -> None:
        reports, now = engines.read_reports(folders), [0.0]
        samples = [np.load(folder / "sample.npz") for folder in folders]
        fakes = [
            FakeEngine(sample["images"], sample["expected"], factor, ms, now)
            for sample, factor, ms in zip(samples, (1.0, 1.01), (4.0, 3.0), strict=True)
        ]
        dense, pruned = engines.measure(reports, fakes, 5, 10.0, clock=lambda: now[0])
        assert torch.equal(fakes[1].images, torch.from_numpy(samples[1]["images"]))
        assert (dense["method"], dense["over_first"], dense["agrees"]) == ("dense", 1.0, True)
        assert (pruned["method"], pruned["tokens_left"], pruned["ms"]) == ("tome", 13, pytest.approx(3.0))
        assert pruned["over_first"] == pytest.approx(0.75)
        assert float(pruned["max_relative_error"]) == pytest.approx(0.01, rel=1e-2)
        assert pruned["agrees"] is False

    def test_what_is_missing_is_named(
        self, engines: Any, folders: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setattr(sys, "argv", ["x", *map(str, folders), "--output", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match=r"TensorRT is needed \(pip install tensorrt\)"):
            engines.main()
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="A CUDA device is needed"):
            engines.main()
        assert list(tmp_path.iterdir()) == []

    def test_folders_that_do_not_go_together(self, engines: Any, folders: list[Path], tmp_path: Path) -> None:
        model = tiny_vit(depth=1, num_classes=5)
        lp.export(model, tmp_path / "other", noise_images(1), format="torch-export", rounds=0)
        with pytest.raises(SystemExit, match=r"must hold ONNX files, got .*other with format 'torch-export'"):
            engines.read_reports([folders[0], tmp_path / "other"])
        with pytest.raises(lp.FileFormatError, match=r"report\.json"):
            engines.read_reports([tmp_path])
