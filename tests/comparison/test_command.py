"""The command of a comparison of methods, from the words that are typed to the files."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from lightning_prune.__main__ import main
from lightning_prune.report.rows import OF_CLASSES, OF_GROUPS, Row

TINY = [
    "--model.model=vit_digits_patch4_56",
    "--model.pretrained=false",
    '--model.model_kwargs={"depth": 4, "embed_dim": 32, "num_heads": 2}',
    "--data=DigitsData",
    "--data.init_args.batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=2",
    "--prune.time_limit=60",
]
METHODS = [
    *("--methods", "dense", "pomt", "tome", "topk", "evit", "random", "vwt-intra", "int8"),
    *("--speedups", "1.1", "1.25", "1.5", "2.0"),
]


@pytest.mark.long
@pytest.mark.usefixtures("clockwork", "drawn")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_of_the_issue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", *TINY, *METHODS, "--output", str(tmp_path)]
    assert main(words) == 0
    names = ["pareto.png", "report.html", "results.csv", "results.json", "profile.json", "profile.png", "tokens.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "schedules", "state"])
    with (tmp_path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [name for name in Row.__dataclass_fields__ if name not in {*OF_CLASSES, *OF_GROUPS}]
    targets = ("1.1x", "1.25x", "1.5x", "2x")
    pruned = [
        f"{method} {target}" for method in ("pomt", "tome", "topk", "evit", "random", "vwt-intra") for target in targets
    ]
    assert [row["variant"] for row in rows] == ["dense", *pruned, "int8"]
    for row in rows[1:-1]:
        assert 1 / float(row["speedup"]) <= 1 / float(row["target_speedup"]) + 0.005
        assert float(row["top1_low"]) < float(row["top1_change"]) < float(row["top1_high"])
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["command"] == shlex.join(["lightning-prune", *words])
    assert document["unreached"] == []
    assert document["energy"]
    saved = lp.Schedule.load(tmp_path / "schedules" / "tome-1.5x.yaml")
    assert len(saved.reducing) > 1
    assert (str(saved.method), saved.made_on.details["target_speedup"]) == ("tome", 1.5)
    told = capsys.readouterr().out
    assert "Validating dense (1 of 26)" in told
    assert "Validating int8 (26 of 26)" in told
    assert "report.html" in told
    table = told.split("variant")[1].split("change: of")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table

    assert main(words) == 0
    told = capsys.readouterr().out
    assert "26 of 26 variants were finished before" in told
    assert "Validating" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods pmot", "Did you mean 'pomt'?"),
        ("--methods pomt --speedups 0.9", "`speedups` must be finite numbers > 1 (1 is the dense model), got 0.9."),
        (
            "--methods pomt --speedups 1.5x",
            "`speedups` must be finite numbers > 1, as in --speedups 1.25 2, got '1.5x'.",
        ),
        ("--methods pomt --speedups=nan", "`speedups` must be finite numbers > 1, as in --speedups 1.25 2, got 'nan'."),
        ("--methods", "methods"),
        ("--methods pomt pomt", "`methods` must differ from one another, got 'pomt' twice."),
        (
            "--methods pomt+int8",
            "`speedups` must be given for pomt+int8, which is not planned by an objective, got None.",
        ),
        ("--methods pomt --max-drop 200%", "`max_drop` must be a number in [0, 1), got 2.0."),
        (
            "--methods pomt --speedups 2 --prune.method pomt --prune.protocol paper",
            "`protocol` must be 'deployed' with",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    assert main(["compare", *TINY, *words.split(), "--output", str(tmp_path)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert message in told[0]
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("old")
    assert main(["compare", *TINY, "--methods", "pomt", f"--output={tmp_path / 'file'}"]) == 2
    assert "error: `output` must be a writable folder, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prune.method.threshold 2.1", "error: `threshold` must be a cosine distance in [0, 2], got 2.1."),
        ("--prune.method.vocabulary nowhere.safetensors", "error: Cannot read nowhere.safetensors: it does not exist"),
    ],
)
def test_what_a_method_says_of_its_settings_is_told_in_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lp.Vocabulary(torch.ones(3, 16), patch_size=4).save(tmp_path / "words.safetensors")
    method = ["--prune.method=lightning_prune.reduction.VWTInter", f"--prune.method.vocabulary={path}"]
    assert main(["compare", *TINY, *method, *words.split(), "--methods", "vwt-inter", f"--output={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.count("\n") == 1
