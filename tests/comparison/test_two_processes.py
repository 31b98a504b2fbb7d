"""Comparisons of two processes: the rows of one, said and written once; and what is left if one of them is lost."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.strategies import DDPStrategy

import lightning_prune as lp
from helpers import python_path
from helpers.fresh import run_ranks
from helpers.models import digits_module
from lightning_prune.comparison.lost_processes import is_lost_process, watching_processes

from .two_ranks import PLANNING

IMAGES = 21  # which two processes cannot divide evenly
TIMED = ("speedup", "latency", "throughput", "peak_memory", "note")


def images_with_groups(folder: Path) -> None:
    """Digits as files, and a table that says which stand left or right."""
    from PIL import Image

    from lightning_prune.classification.digits import ClutteredDigits

    digits, lines = ClutteredDigits("held_out"), []
    for index in range(IMAGES):
        pixels, label = digits[index]
        gray = ((pixels[0] - pixels.min()) / (pixels.max() - pixels.min()) * 255).byte().numpy()
        Image.fromarray(gray).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "label": label, "side": index % 3 % 2})
    with (folder / "metadata.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(lines[0]))
        table.writeheader()
        table.writerows(lines)


@pytest.mark.long
def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    images_with_groups(tmp_path)
    runs = run_ranks(Path(__file__).with_name("two_ranks.py"), str(tmp_path), folder=tmp_path)
    assert [run.returncode for run in runs] == [0, 0], [run.stderr[-2000:] for run in runs]
    first, second = (json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2))
    alone, together, again = first["alone"], first["together"], first["again"]
    assert [row["variant"] for row in together["rows"]] == ["dense", "topk given"]
    for one, two in zip(alone["rows"], together["rows"], strict=True):
        for name, value in one.items():
            if not name.startswith(TIMED):
                assert two[name] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value), (
                    name
                )
    row = together["rows"][1]
    assert row["images"] == IMAGES
    assert None not in [row[name] for name in ("agreement", "worst_group_accuracy", "metric_low")]
    assert "" not in [row["worst_class"], row["worst_group"]]
    assert row["metric_name"] == "confidence"
    assert second["together"]["rows"] == together["rows"]
    assert second["together"]["waited"] < PLANNING / 2, "the wait was a collective operation, which has a timeout"
    assert [text for text in together["messages"] if text.startswith("Validating")] == [
        "Validating dense (1 of 2)",
        "Validating topk given (2 of 2)",
    ]
    assert second["together"]["messages"] == second["together"]["files"] == []
    assert "results.csv" in together["files"]
    assert again["rows"] == together["rows"], "all of it was kept"
    assert any("2 of 2 variants were finished before" in text for text in again["messages"])
    document = json.loads((tmp_path / "two" / "results.json").read_text())
    assert document["config"]["trainer"]["processes"] == 2


def losing(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A comparison of two processes, the second of which Lightning starts."""
    words = [
        "compare",
        "--model.model=vit_digits_patch4_56",
        "--model.pretrained=false",
        '--model.model_kwargs={"depth": 2, "embed_dim": 16, "num_heads": 1}',
        "--data=DigitsData",
        "--data.init_args.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.limit_val_batches=3",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--prune.method=topk",
        "--prune.objective=Utility",
        "--prune.schedule=90",
        "--prune.time_limit=0.01",
        f"--output={folder / 'out'}",
    ]
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("losing_rank.py")), *words],
        env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.long
def test_a_lost_process_ends_the_command_and_loses_no_finished_row(tmp_path: Path) -> None:
    lost = losing(tmp_path, LOST_RANK="1")
    assert lost.returncode != 0
    assert "the plan and 1 of 2 validated variants" in lost.stderr
    assert "Traceback" not in lost.stderr
    assert not (tmp_path / "out" / "results.json").exists()
    done = losing(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 variants were finished before" in done.stdout
    assert "Validating dense" not in done.stdout
    assert done.stdout.count("Validating topk given") == done.stdout.count("Written: ") == 1
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [24, 24]


class Ended:
    """A process that has ended."""

    def __init__(self, status: int | None) -> None:
        self.status = status

    def poll(self) -> int | None:
        return self.status


@pytest.mark.parametrize(
    ("status", "said"), [(-9, "was ended by SIGKILL"), (2, "ended with status 2"), (0, ""), (None, "")]
)
def test_what_is_said_of_a_lost_process(status: int | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = SimpleNamespace(procs=[Ended(None), Ended(status)])
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), world_size=3, global_rank=0)
    with watching_processes(trainer, lambda: "Kept: 1 row."):
        time.sleep(0.8)
    printed = capsys.readouterr().err
    assert printed == (f"error: rank 2 of 3 processes {said}. Kept: 1 row.\n" if said else "")


def test_errors_of_lost_processes_are_told_from_others() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:7602."
    assert is_lost_process(RuntimeError(gloo))
    assert not is_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_process(ValueError(gloo))


def test_processes_that_keep_the_results_are_refused() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="spawn"), logger=False)
    with pytest.raises(lp.UnsupportedModelError, match="ddp_spawn"):
        lp.compare(trainer, digits_module(), lp.DigitsData(batch_size=4))
