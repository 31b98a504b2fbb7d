"""Mistakes in the names of commands, options, keys and methods: found at once; nothing valid is refused."""

from pathlib import Path

import pytest
import yaml

from lightning_prune.__main__ import main
from lightning_prune.cli.typos import missing_in, mistake_in

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("line", "named", "meant"),
    [
        ("vaildate", "'vaildate'", "validate"),
        ("modles", "'modles'", "models"),
        ("validate --prune.time_limt=3", "--prune.time_limt", "--prune.time_limit"),
        ("validate --prune.time-limt 3", "--prune.time-limt", "--prune.time_limit"),
        ("validate --time_limit 3", "--time_limit", "--prune.time_limit"),
        ("validate --prun.schedule 3", "--prun.schedule", "--prune.schedule"),
        ("validate --buget 3ms", "--buget", "--budget"),
        ("validate --max-drp=1%", "--max-drp", "--max_drop"),
        ("validate --data DigitsData --data.batchsize 3", "--data.batchsize", "--data.batch_size"),
        ("validate --data DigitsData --data.init_args.batchsize 3", "--data.init_args.batchsize", "--data.batch_size"),
        ("validate --model.weight x.pth", "--model.weight", "--model.weights"),
        ("validate --trainer.limit_val_batchs 3", "--trainer.limit_val_batchs", "--trainer.limit_val_batches"),
        ("compare --method pomt", "--method", "--methods"),
        ("compare --methods dense pmot tome", "'pmot'", "'pomt'"),
        ("compare --methods=tome+int8 pmot+int8", "'pmot'", "'pomt'"),
        ("validate --prune.method pomt-nearst", "'pomt-nearst'", "'pomt-nearest'"),
        ("validate --prune.objective LatencyBudget --prune.objective.spedup 2", ".spedup", "--prune.objective.speedup"),
        ("validate configs/digits.yaml", "'configs/digits.yaml'", "--config configs/digits.yaml"),
    ],
)
def test_a_mistake_is_named_with_what_was_meant(line: str, named: str, meant: str) -> None:
    found = mistake_in(line.split())
    assert found is not None
    assert named in found
    assert found.endswith(f"Did you mean {meant}?")


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("validate", "`data`"),
        ("validate --data DigitsData", None),
        ("validate --print_config", None),
        ("compare --model.model vit_tiny_patch16_224 --budget 2x", "`data`"),
        ("plan --config {config}", "`data`"),
        ("plan --config {config} --data.class_path DigitsData", None),
        ("plan --config={config} --data=DigitsData", None),
        ("plan --config {nested} --model.model=vit_tiny_patch16_224", None),
        ("test --config {nested} --model.model=vit_tiny_patch16_224", "`data`"),
        ("plan --config nowhere.yaml", None),
        ("models", None),
    ],
)
def test_what_is_missing_is_said_at_once(line: str, missing: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"model": "vit_tiny_patch16_224"}}))
    (tmp_path / "nested.yaml").write_text(yaml.safe_dump({"plan": {"data": "DigitsData"}}))
    words = line.format(config=tmp_path / "config.yaml", nested=tmp_path / "nested.yaml").split()
    found = missing_in(words)
    assert found is None if missing is None else found is not None and found.startswith(missing)


@pytest.mark.parametrize(
    ("content", "key", "meant"),
    [
        ({"modle": {"model": "x"}}, "modle", "model"),
        ({"prune": {"time_limt": 3}}, "prune.time_limt", "prune.time_limit"),
        ({"data": {"class_path": "DigitsData", "init_args": {"batchsize": 3}}}, "data.batchsize", "data.batch_size"),
        ({"trainer": {"callback+": []}}, "trainer.callback", "trainer.callbacks"),
        (
            {"prune": {"objective": {"class_path": "lightning_prune.Utility", "init_args": {"alhpa": 1}}}},
            "prune.objective.alhpa",
            "prune.objective.alpha",
        ),
    ],
)
def test_a_mistake_in_a_configuration_is_named_with_its_file(
    content: dict[str, object], key: str, meant: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    for words in (["--config", str(path)], [f"--config={path}"], ["-c", str(path)]):
        assert mistake_in(["validate", *words]) == f"Unknown key {key} in {path}. Did you mean {meant}?"


@pytest.mark.parametrize(
    "line",
    [
        "validate --prune.schedule -1 --prune.schedule=[3,0]",
        "validate --trainer.callbacks+=TokenPruning --trainer.callbacks.time_limit=3 --trainer.logger.help CSVLogger",
        "validate --data mine.Data --data.colour 3 --data.init_args.size=4 --model.model mine.Net --model.model.x 3",
        "validate --data.class_path=DigitsData --data.init_args.batch_size=4 --data.help DigitsData --optimizer SGD",
        "validate --prune.objective mine.Goal --prune.objective.x 3 --prune.method mine.Method --prune.method.y 3",
        "validate --prune.method random:seed=3 --prune.objective.init_args.max_drop=0.1 --ckpt_path=a --verbose false",
        "compare --methods dense pomt+int8 vwt-inter:vocabulary=x --speedups 1.5 2 --runtimes torch --resume=false",
        "compare --per-class --resume --output o",
        "plan --budget 12ms --max-drop=1% --device simulated:tile=8 --profile p.json --output o --print_config",
        "--config configs/digits.yaml validate",
        "models vit_*",
        "validate --config nowhere.yaml",
    ],
)
def test_nothing_valid_is_refused(line: str) -> None:
    assert mistake_in(line.split()) is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configurations_have_no_mistakes(path: Path) -> None:
    assert mistake_in(["compare", "--config", str(path)]) is None


def test_the_class_of_a_later_source_takes_precedence(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {class_path: ImageFolderData, init_args: {root: x}}\nprune: {objective: {class_path: Utility}}"
    )
    words = ["validate", "--config", str(path)]
    assert mistake_in([*words, "--data.split=val", "--prune.objective.alpha=0.3"]) is None
    assert mistake_in([*words, "--data.placements=2"]) is not None
    assert mistake_in([*words, "--data=DigitsData", "--data.placements=2"]) is None
    assert mistake_in([*words, "--prune.objective=AccuracyBudget", "--prune.objective.alpha=0.3"]) is not None


def test_a_mistake_ends_the_command_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--prune.time_limt=3"]) == 2
    assert capsys.readouterr() == ("", "error: Unknown option --prune.time_limt. Did you mean --prune.time_limit?\n")
