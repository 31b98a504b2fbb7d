"""The command `export`, and `validate` with the folder that it wrote."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from helpers.data import noise_images
from helpers.dense import CalledDenseModule, DenseModule, dense_net
from helpers.models import DIGITS_MODEL, digits_module
from lightning_prune.__main__ import main
from lightning_prune._utils.formatting import with_tail
from lightning_prune.callbacks import TokenPruning
from lightning_prune.cli.trainer import PruneTrainer
from lightning_prune.exporting import ExportReport

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "limit_val_batches": 3,
}  # fmt: skip
TINY = [
    f"--model.model={DIGITS_MODEL}",
    "--model.pretrained=false",
    '--model.model_kwargs={"depth": 2, "embed_dim": 16, "num_heads": 2}',
]
DATA = ["--data=DigitsData", "--data.init_args.batch_size=8", "--trainer.accelerator=cpu"]
DATA += ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=3"]
COMMAND = ["export", *TINY, *DATA, "--format=torch-export", "--prune.calibration=20", "--prune.verbose=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exports")
    schedule = lp.Schedule([0, 60], "topk").save(path / "schedule.yaml")
    assert main([*COMMAND, f"--schedule={schedule}", "--batch-size=4", f"--output={path / 'out'}"]) == 0
    return path


def test_the_folder(folder: Path) -> None:
    report = ExportReport.read(folder / "out")
    assert (report.input_shape, report.tokens, report.method) == ((4, 1, 56, 56), (197, 137), "topk")
    assert report.parity.images == 20
    assert report.latency is not None
    assert lp.Schedule.load(folder / "out" / "schedule.yaml") == lp.Schedule.load(folder / "schedule.yaml")


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "again"
    assert main([*COMMAND, "--prune.method=tome", "--prune.schedule=20", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert f"{output / 'model.pt2'}: tokens removed by tome, 177 left, exact tail, float32, static batch." in printed
    assert "on 20 images: 100.00% of the same class, largest relative error " in printed
    assert "Operators: " in printed
    assert f"Written: {output / 'README.md'}, " in printed


def test_validate_runs_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--exported", str(folder / "out"), *DATA]) == 0
    printed = capsys.readouterr().out
    assert "val/top1" in printed
    latency = ExportReport.read(folder / "out").latency
    assert latency is not None
    exported, dense = (
        with_tail(latency.exported_ms, latency.exported_p90_ms),
        with_tail(latency.dense_ms, latency.dense_p90_ms),
    )
    assert f"{exported} for 4 images, {dense} dense in float32" in printed


def test_several_files_are_compared_with_the_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = folder / "dense"
    assert main([*COMMAND, "--prune.schedule=0", "--prune.method=topk", "--batch-size=4", f"--output={dense}"]) == 0
    capsys.readouterr()
    assert main(["validate", "--exported", str(dense), str(folder / "out"), *DATA]) == 0
    printed = capsys.readouterr().out
    tops = []
    for path in (dense, folder / "out"):
        module = lp.ImageClassifier(lp.load_exported(path))
        (found,) = L.Trainer(**QUIET).validate(module, lp.DigitsData(batch_size=8), verbose=False)
        tops.append(found["val/top1"])
    table = printed[printed.index("faster") :]
    first, second = (f"{100 * top1:.2f}%" for top1 in tops)
    assert (
        table.index(first)
        < table.index("1.00x")
        < table.rindex(second)
        < table.index(f"{100 * (tops[1] - tops[0]):+.2f}")
    )
    assert "by the same images" in table


def test_a_changed_file_is_not_validated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "out" / "model.pt2"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    try:
        assert main(["validate", "--exported", str(folder / "out"), *DATA]) == 2
    finally:
        path.write_bytes(content)
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {path} was changed since it was exported")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output=OUT/new"], "`schedule` must be the file of a schedule"),
        (["--output=OUT/new", "--budget=1.5x"], "`prune.objective` must be left out"),
        (["--prune.schedule=5", "--prune.method=topk", "--output=OUT/out"], "`output` must be a new or empty folder"),
        (
            ["--schedule=OUT/schedule.yaml", "--prune.schedule=5", "--output=OUT/new"],
            "`prune.schedule` must be left out",
        ),
        (["--schedule=OUT/none.yaml", "--output=OUT/new"], "Cannot read"),
        (["--schedule=OUT/schedule.yaml", "--format=onxx", "--output=OUT/new"], "Did you mean 'onnx'?"),
        (["--schedule=OUT/schedule.yaml", "--batch-size=0", "--output=OUT/new"], "`batch_size` must be"),
        (["--schedule=OUT/schedule.yaml", "--precision=int8", "--output=OUT/new"], "`precision` must be 'float32'"),
        (
            ["--schedule=OUT/schedule.yaml", "--min-agreement=0.9", "--output=OUT/new"],
            "`min_agreement` must be left out",
        ),
    ],
)
def test_bad_input_ends_with_status_2(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [each.replace("OUT", str(folder)) for each in options]
    assert main([*COMMAND, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "new").exists()


def test_accuracy_of_the_file_is_that_of_the_patched_model(tmp_path: Path) -> None:
    module, data = digits_module(shape={"depth": 2}), lp.DigitsData(batch_size=8)
    pruner = TokenPruning("topk", schedule=60, block=1, calibration=20, verbose=False)
    report = PruneTrainer(callbacks=[pruner], **QUIET).export(
        module, datamodule=data, output=str(tmp_path / "out"), format="torch-export"
    )
    assert report.tokens == (197, 137)
    exported = lp.ImageClassifier(lp.load_exported(tmp_path / "out"))
    assert exported.data_config == module.data_config
    (found,) = L.Trainer(**QUIET).validate(exported, data, verbose=False)
    with lp.patch(module, "topk", lp.Schedule([0, 60])):
        (expected,) = L.Trainer(**QUIET).validate(module, data, verbose=False)
    for name in ("val/top1", "val/top5", "val/loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    assert torch.is_inference_mode_enabled() is False


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "is_planned"),
    [
        (CalledDenseModule, True),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [(CalledDenseModule, False), (DenseModule, True)]),
    ],
)
def test_a_dense_module_gives_tokens_back(tmp_path: Path, kind: type[DenseModule], is_planned: bool) -> None:
    module, schedule = kind(dense_net()), lp.Schedule([0, 5, 0, 3], "topk")
    images = noise_images(8)
    loader = DataLoader(TensorDataset(images, noise_images(8, 1, 4, seed=2)), batch_size=4)
    trainer = PruneTrainer(**QUIET)
    path = schedule.save(tmp_path / "schedule.yaml") if is_planned else None
    pruner = TokenPruning(schedule="auto" if is_planned else schedule, restore="auto", calibration=8, verbose=False)
    trainer.callbacks.append(pruner)
    report = trainer.export(
        module, loader, output=str(tmp_path / "out"), schedule=path and str(path), format="torch-export"
    )
    assert report.tokens == (17, 12, 12, 9)
    assert module.trainer is trainer
    with torch.no_grad(), lp.patch(module.net, schedule, restore="auto"):
        expected = module.net(images[:4] - 0.5 if kind is CalledDenseModule else images[:4])
    torch.testing.assert_close(lp.load_exported(tmp_path / "out")(images[:4]), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(module.net(images[:4]), expected, rtol=1e-3, atol=1e-4)
