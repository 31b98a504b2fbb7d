"""The command line: files, output and exit status. Most commands run in the test process."""

import csv
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_prune as lp
from helpers.clock import set_latency
from helpers.fresh import run_fresh, run_ranks
from lightning_prune.__main__ import main
from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.decider import Decider
from lightning_prune.cli.usage import COMMANDS
from lightning_prune.comparison import read_results
from lightning_prune.profiling.model_variants import Variant, VariantSwitch
from lightning_prune.report.rows import OF_CLASSES, OF_GROUPS, Row

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
TINY = [
    "--model.model=vit_digits_patch4_56",
    "--model.pretrained=false",
    '--model.model_kwargs={"depth": 4, "embed_dim": 32, "num_heads": 2}',
    "--data=DigitsData",
    "--data.init_args.batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_test_batches=2",
    "--prune.time_limit=0.5",
    "--prune.calibration=8",
    "--prune.method=pomt",
    "--prune.objective=Utility",
]
COLUMNS = [
    *("variant", "method", "top1", "top1_change", "speedup", "latency_ms", "latency_p90_ms", "runtime", "precision"),
    *("peak_memory_mib", "gmacs", "speedup_vs_eager", "metric", "metric_change", "metric_name"),
    *("metric_low", "metric_high"),
    *("int8", "target_speedup", "block", "removed", "tokens", "top1_low", "top1_high", "top5", "agreement"),
    *("latency_low_ms", "latency_high_ms", "latency_spread", "speedup_spread", "throughput", "throughput_end_to_end"),
    *("joules_per_image", "watts", "images", "device", "batch_size", "note"),
]


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a command that must fail with status 2 and one line on standard error; returns that line."""
    assert main([*words]) == 2
    lines = capsys.readouterr().err.splitlines()
    printed = [line for line in lines if line.startswith("error: ")]
    assert len(printed) == 1
    assert lines[-1] == printed[0]
    return printed[0].removeprefix("error: ")


def test_deprecations_in_libraries_of_libraries_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """Importing transformers imports torchao, at whose classes torch warns in its log."""
    from lightning_prune.cli.main import run  # as `main` does, after it has looked for mistakes

    assert run(["validate", "--model.model=a/name", *TINY[1:]]) == 2
    assert not logging.getLogger("torch.utils._pytree").isEnabledFor(logging.WARNING)
    assert logging.getLogger("torch.utils._pytree").isEnabledFor(logging.ERROR)
    assert len(capsys.readouterr().err.splitlines()) == 1


def separate(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize(
    "words",
    [["--help"], [], ["--version"], ["validate", "--help"], ["vaildate"], ["validate", "--config", "bad.yaml"]],
    ids=" ".join,
)
def test_help_version_and_mistakes_need_no_torch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("prune: {time_limt: 3}\n")
    run = separate("-X", "importtime", "-m", "lightning_prune", *words, cwd=tmp_path)
    imported = {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "lightning_prune" in imported
    assert not imported & {"torch", "lightning", "timm", "numpy", "jsonargparse", "matplotlib"}
    mistaken = not words or words[0] == "vaildate" or "bad.yaml" in words
    assert run.returncode == (2 if mistaken else 0)
    if words == ["--version"]:
        assert run.stdout == f"lightning-prune {lp.__version__}\n"
    elif words in ([], ["--help"]):
        assert all(word in run.stdout for word in (*COMMANDS, "--prune.schedule", "--output DIR", "--max-drop"))
        assert max(map(len, run.stdout.splitlines())) <= 120
    elif mistaken:
        assert "Did you mean" in run.stderr


def test_the_installed_command_is_main() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    assert 'lightning-prune = "lightning_prune.__main__:main"' in declared
    point = importlib.metadata.EntryPoint("lightning-prune", "lightning_prune.__main__:main", "console_scripts")
    assert point.load() is main


@pytest.mark.usefixtures("drawn")
def test_compare_writes_all_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[Variant] = []
    switch = VariantSwitch.to

    def to(self: VariantSwitch, variant: Variant) -> None:
        switch(self, variant)
        current[:] = [variant]

    def seconds(alternative: Any) -> float:  # a millisecond for each token that leaves a block: pruning always pays
        if isinstance(alternative, int):
            return 4e-3 * alternative
        schedule = current[0].schedule
        return 1e-3 * sum(schedule.tokens(197) if isinstance(schedule, lp.Schedule) else [197] * 4)

    monkeypatch.setattr(VariantSwitch, "to", to)
    set_latency(monkeypatch, seconds)
    words = ["--prune.method=topk", "--max-drop=1%", "--prune.time_limit=20"]  # time enough on a busy machine, too
    assert main(["compare", *TINY, *words, f"--output={tmp_path}"]) == 0
    files = ["pareto.png", "profile.json", "profile.png", "report.html", "results.csv", "results.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(*files, "schedule.yaml", "schedules", "state", "tokens.png")
    ]
    with (tmp_path / "results.csv").open(newline="") as stream:
        reader = csv.DictReader(stream)
        assert (
            reader.fieldnames
            == COLUMNS
            == [name for name in Row.__dataclass_fields__ if name not in {*OF_CLASSES, *OF_GROUPS}]
        )
        rows = list(reader)
    assert [row["variant"] for row in rows] == ["dense", "pomt utility", "topk accuracy budget"]
    assert {row["images"] for row in rows} == {"8"}
    document = read_results(tmp_path / "results.json")
    assert [list(row) for row in document["rows"]] == [list(Row.__dataclass_fields__)] * 3
    assert document["config"]["command_line"]["prune"]["time_limit"] == 20
    assert document["config"]["command_line"]["model"]["model"] == "vit_digits_patch4_56"
    schedule = lp.Schedule.load(tmp_path / "schedule.yaml")
    (chosen,) = (row for row in rows if row["variant"] == document["best"]["variant"])
    assert (schedule.depth, schedule.total_removed) == (4, int(chosen["removed"]))
    assert schedule.made_on.batch_size == 4
    profile = lp.LatencyProfile.load(tmp_path / "profile.json")
    assert profile.dense_tokens == 197
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("dense", "pomt utility", "topk accuracy budget", "results.csv"))


def test_compare_under_a_schedule_and_validate_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *TINY, "--prune.schedule=90", "--prune.block=2", f"--output={tmp_path}"]) == 0
    document = read_results(tmp_path / "results.json")
    chosen = lp.Schedule.load(tmp_path / "schedule.yaml")  # since an objective is stated
    assert chosen.total_removed == (90 if document["best"]["variant"] == "pomt given" else 0)
    capsys.readouterr()
    assert main(["validate", *TINY, f"--prune.schedule={tmp_path / 'schedules' / 'pomt-given.yaml'}"]) == 0
    printed = capsys.readouterr().out
    assert "R = 90 (pomt: 90 at block 2)" in printed
    assert "197 -> 107" in printed
    assert "val/top1" in printed
    assert "pruning/speedup" in printed


def test_validate_with_a_saved_schedule_of_several_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lp.Schedule([90, 0, 5, 0], ["tome", None, "topk", None]).save(tmp_path / "mixed.yaml")
    tiny = [word for word in TINY if not word.startswith(("--prune.method", "--prune.objective"))]
    assert main(["validate", *tiny, f"--prune.schedule={path}"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "R = 95 (mixed: block 0: tome: 90, block 2: topk: 5)" in printed
    assert "197 -> 102" in printed
    assert "`method`" in fails(capsys, "validate", *TINY, f"--prune.schedule={path}")


@pytest.mark.parametrize("value", ["auto", "12", "0.5", "[3,0,4,0]"])
def test_every_form_of_a_schedule_is_accepted(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", *TINY, f"--prune.schedule={value}"]) == 0
    printed = capsys.readouterr().out
    assert "test/top1" in printed
    panel = {
        "auto": "judged by",
        "12": "R = 12 (pomt: 12 at block 1)",
        "0.5": "R = 98 (pomt: 98 at block 1 by keep rate)",
        "[3,0,4,0]": "3 at block 0, 4 at block 2",
    }
    assert panel[value] in printed


def test_profile_writes_json_and_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *TINY, "--prune.method=random", f"--output={tmp_path / 'deep' / 'er'}"]) == 0
    profile = lp.LatencyProfile.load(tmp_path / "deep" / "er" / "profile.json")
    assert (profile.method, profile.block) == ("random", 1)
    assert (tmp_path / "deep" / "er" / "profile.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "latency ms" in printed
    assert "Cliffs: " in printed


def test_an_objective_can_be_given(tmp_path: Path) -> None:
    words = ["--prune.objective=lightning_prune.planning.AccuracyBudget", "--prune.objective.init_args.max_drop=0.9"]
    assert main(["compare", *TINY, *words, f"--output={tmp_path}"]) == 0
    variants = json.loads((tmp_path / "results.json").read_text())["variants"]
    assert variants["pomt accuracy budget"]["objective"] == "accuracy budget, at most 90% lost"


def test_a_missed_budget_gives_exit_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--methods", "random", "--budget", "500x", f"--output={tmp_path}"]
    tiny = [word for word in TINY if not word.startswith("--prune.objective")]
    assert main(["compare", *tiny, *words]) == 3
    best = read_results(tmp_path / "results.json")["best"]
    assert best["met"] is False
    assert "No variant meets the latency budget, 500x." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["plan", "validate", "test"])
def test_a_single_plan_that_misses_the_budget_gives_exit_status_3(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [word for word in TINY if not word.startswith("--prune.objective")]
    output = [f"--output={tmp_path}"] if command == "plan" else []
    assert main([command, *tiny, *output, "--budget=500x"]) == 3
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "latency budget, 500x" in printed
    assert re.search(r"latency budget, 500x (cannot be reached|is not met)", printed)
    if command == "plan":
        assert (tmp_path / "schedule.yaml").exists()
        assert json.loads((tmp_path / "plan.json").read_text())["met"] is False
    assert main([command, *tiny, *output, "--budget=9999999ms@p90"]) == 0
    assert "The dense model meets the latency budget" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--prune.method=pmot"],
            "got 'pmot'. Did you mean 'pomt'?",
        ),
        (["--prune.objective=Utility", "--prune.objective.alpha=2"], "`alpha` must be a number in [0, 1], got 2.0."),
        (["--prune.time_limit=long"], "Parser key \"prune.time_limit\": Expected a <class 'float'>. Got value: long"),
        (["--prune.block=4"], "`block` must be an index from 0 to 3 or a fraction in [0, 1), got 4."),
        (["--prune.time_limit=0"], "`time_limit` must be a number of seconds > 0, got 0.0."),
        (["--prune.calibration=0"], "`calibration` must be a number of images >= 1, "),
        (["--prune.schedule=197"], "of the 197 tokens that enter block 1 with pomt, got 197"),
        (["--prune.schedule=[1,2]"], "`schedule` must have 4 blocks, as the model, got 2."),
        (["--prune.schedule=nowhere.yaml"], "Cannot read nowhere.yaml: No such file or directory."),
        (["--prune.module_path=vit"], "must be the dotted path of a module in ImageClassifier, got 'vit'."),
        (["--prune.keep=3"], "Unknown option --prune.keep."),
        (["--model.num_classes=5"], "`model` must have 10 classes for DigitsData, got 5."),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--trainer.callbacks+=TokenPruning"], "A Trainer can have one TokenPruning callback, got 2."),
        (["--trainer.limit_val_batches=1.5"], "invalid value 1.5 for limit_val_batches"),
        (["--data=Nothing"], "Nothing"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["--trainer.accelerator=abacus"], "trainer: You selected an invalid accelerator name: `accelerator='abacus'`"),
        (["--trainer.accelerator=tpu"], "trainer: Requirement 'torch_xla"),
        (["--trainer.strategy=solo"], "trainer: You selected an invalid strategy name: `strategy='solo'`"),
        (["--trainer.devices=few"], "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_are_printed_on_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, "validate", *TINY, *words)


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "prune")
    assert message == f"`command` must be one of {', '.join(COMMANDS)}, got 'prune'."
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out.split("commands:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  (\w+)", printed, re.MULTILINE) == list(COMMANDS)


def test_short_forms_of_the_objective(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["validate", *TINY, "--budget=1.5x", "--prune.use-cache=false", "--print-config"])
    assert end.value.code == 0
    prune = yaml.safe_load(capsys.readouterr().out)["prune"]
    assert prune["objective"]["class_path"].endswith("LatencyBudget")
    assert (prune["objective"]["init_args"]["speedup"], prune["use_cache"]) == (1.5, False)


def test_an_unknown_model_suggests_others(capsys: pytest.CaptureFixture[str]) -> None:
    printed = fails(capsys, "validate", "--model.model=vit_digit_patch4_56", "--data=DigitsData")
    assert "'vit_digit_patch4_56'" in printed
    assert "vit_digits_patch4_56" in printed.split("Similar: ")[1]


@pytest.mark.parametrize("content", ["removed: [1, 2", "learning_rate: 0.1\n", "", "\x00\x01"])
def test_invalid_schedule_files_are_rejected(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(content)
    printed = fails(capsys, "validate", *TINY, f"--prune.schedule={path}")
    assert str(path) in printed
    assert "lightning_prune.schedule or lightning_prune.keep_rates file" in printed


@pytest.mark.parametrize("command", ["compare", "profile"])
def test_an_output_that_is_a_file_is_rejected(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results"
    path.write_text("old")
    printed = fails(capsys, command, *TINY, f"--output={path}")
    assert printed.startswith("`output` must be a writable folder, got ")
    assert path.read_text() == "old"


@pytest.mark.parametrize("mistake", ["--prune.schedule=197", "--model.num_classes=5", "--trainer.limit_val_batches=0"])
def test_a_failed_comparison_keeps_the_folder(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("results.csv", "results.json", "schedule.yaml", "profile.json", "profile.png", "mine.txt")
    for name in names:
        (tmp_path / name).write_text(f"old {name}")
    fails(capsys, "compare", *TINY, mistake, f"--output={tmp_path}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: f"old {name}" for name in names}


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, TypeError, ImportError])
def test_an_unexpected_error_keeps_its_traceback(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A one-line message would hide the location of the error."""

    def broken(self: Decider, *args: Any) -> None:
        raise error

    monkeypatch.setattr(Decider, "decide", broken)
    with pytest.raises(error):
        main(["validate", *TINY])


def within(given: Any, printed: Any) -> bool:
    """Whether the printed configuration contains the given one."""
    if isinstance(given, dict):
        return given.keys() <= printed.keys() and all(within(given[key], printed[key]) for key in given)
    return bool(given == printed)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name != "pruning.yaml"))
def test_shipped_configs_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["compare", f"--config={CONFIGS / name}", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load((CONFIGS / name).read_text())
    assert all(within(given[key], printed[key]) for key in ("prune", "model"))
    assert within(given["data"]["init_args"], printed["data"]["init_args"])


@pytest.mark.parametrize(
    "name", ["imagenet_deit_small.yaml", "imagenet_torchvision_vit.yaml", "imagenet_vit_large.yaml"]
)
def test_commands_in_the_configs_give_the_data_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^# +lightning-prune (.+)$", (CONFIGS / name).read_text(), re.MULTILINE)
    assert "--data.root /path/to/imagenet" in command
    with pytest.raises(SystemExit) as end:
        main([*command.replace("configs/", f"{CONFIGS}/").split(), "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["root"] == "/path/to/imagenet"


APP = '''
import lightning as L
import timm
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset


class Theirs(L.LightningModule):
    """A LightningModule without pruning."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.encoder = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=width, depth=4, num_heads=2, num_classes=5
        )

    def validation_step(self, batch, batch_idx):
        seen = []
        hook = self.encoder.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        self.encoder(batch[0])
        hook.remove()
        print("TOKENS", seen[0])


class Data(L.LightningDataModule):
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(12, 3, 32, 32), torch.zeros(12).long()), batch_size=4)


class Own(L.Callback):
    def __init__(self, word: str):
        self.word = word

    def on_validation_end(self, trainer, pl_module):
        print("OWN", self.word, sorted(type(callback).__name__ for callback in trainer.callbacks))


if __name__ == "__main__":
    LightningCLI(Theirs, Data, save_config_callback=None)
'''
APP_CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: __main__.Own
      init_args:
        word: kept
model:
  width: 32
"""


@pytest.mark.long
def test_overlay_adds_pruning_to_another_application(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "config.yaml").write_text(APP_CONFIG)
    overlay = yaml.safe_load((CONFIGS / "pruning.yaml").read_text())
    (added,) = overlay["trainer"]["callbacks+"]
    assert added["class_path"] == "lightning_prune.callbacks.TokenPruning"
    words = ["app.py", "validate", "--config", "config.yaml", "--config", str(CONFIGS / "pruning.yaml")]
    short = [
        "--trainer.callbacks.time_limit=0.5",
        "--trainer.callbacks.calibration=8",
        "--trainer.callbacks.schedule=5",
    ]
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run = run_fresh(code, *words, *short, lightning=True, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stdout.splitlines() if line.startswith("TOKENS")] == ["TOKENS 12"] * 3
    (own,) = (line for line in run.stdout.splitlines() if line.startswith("OWN"))
    assert own.startswith("OWN kept")
    assert "'Own'" in own
    assert "'TokenPruning'" in own
    assert "R = 5 (tome: " in run.stdout


def test_overlay_names_the_supported_libraries() -> None:
    text = (CONFIGS / "pruning.yaml").read_text()
    assert all(library in text for library in ("timm", "torchvision", "transformers"))


def test_overlay_has_the_defaults_of_the_callback() -> None:
    import inspect

    (added,) = yaml.safe_load((CONFIGS / "pruning.yaml").read_text())["trainer"]["callbacks+"]
    defaults = {name: p.default for name, p in inspect.signature(TokenPruning.__init__).parameters.items()}
    assert added["init_args"].items() <= defaults.items()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as image files: ten classes, with a number of images that two processes cannot divide evenly."""
    from PIL import Image

    from lightning_prune.classification.digits import ClutteredDigits

    root, digits = tmp_path_factory.mktemp("images"), ClutteredDigits("held_out")
    wanted = {label: 3 if label else 2 for label in range(10)}
    for index in range(len(digits)):
        pixels, label = digits[index]
        if wanted[label]:
            (root / f"class{label}").mkdir(exist_ok=True)
            gray = ((pixels[0] - pixels.min()) / (pixels.max() - pixels.min()) * 255).byte().numpy()
            Image.fromarray(gray).save(root / f"class{label}" / f"{wanted[label]}.png")
            wanted[label] -= 1
    assert sum(wanted.values()) == 0
    return root


def images_of(folder: Path) -> list[str]:
    of_digits = ("--data=DigitsData", "--trainer.limit_")
    words = [word for word in TINY if not word.startswith(of_digits)]
    words.insert(3, "--data=ImageFolderData")  # before what is set of it
    return [*words, f"--data.init_args.root={folder}", "--data.init_args.num_workers=0", "--prune.schedule=90"]


DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]


TWO_COMMANDS = """
import json, os, pathlib, sys
from lightning_prune.__main__ import main
statuses = [main(words) for words in json.loads(sys.argv[1])]
pathlib.Path(f"statuses.{os.environ['LOCAL_RANK']}").write_text(json.dumps(statuses))
"""


@pytest.mark.long
def test_validate_in_two_processes_prints_the_same_as_in_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error on rank 0 ends both commands and is printed by both."""

    def figures(printed: str) -> dict[str, float]:
        rows = re.findall(r"(val/top1|val/top5|val/loss|pruning/removed|pruning/tokens)[ │]+([\d.e-]+)", printed)
        return {name: float(value) for name, value in rows}

    (tmp_path / "commands.py").write_text(TWO_COMMANDS)
    words = ["validate", *images_of(folder)]
    commands = [[*words, *DDP], [*words, *DDP, "--prune.schedule=197"]]
    ranks = run_ranks(tmp_path / "commands.py", json.dumps(commands), folder=tmp_path)
    assert [run.returncode for run in ranks] == [0, 0], ranks
    assert main(words) == 0
    alone, together = figures(capsys.readouterr().out), figures(ranks[0].stdout)
    assert list(alone) == ["pruning/removed", "pruning/tokens", "val/loss", "val/top1", "val/top5"]
    assert together == pytest.approx(alone, rel=1e-6)
    assert together["val/top1"] == alone["val/top1"]
    assert 0 < together["val/top5"] == alone["val/top5"] < 1
    assert together["pruning/removed"] == 90
    assert [run.stdout.count("Token pruning") for run in ranks] == [1, 0]  # rank 0 alone tells
    assert [json.loads((tmp_path / f"statuses.{rank}").read_text()) for rank in range(2)] == [[0, 2], [0, 2]]
    message = "`schedule` must remove at most 194 of the 197 tokens that enter block 1 with pomt, got 197."
    errors = [[line for line in run.stderr.splitlines() if line.startswith("error: ")] for run in ranks]
    assert errors == [[f"error: {message}"], [f"error: ScheduleError on rank 0: {message}"]]


@pytest.mark.long
def test_compare_in_two_processes_writes_the_same_as_in_one(folder: Path, tmp_path: Path) -> None:
    """Here Lightning starts the second process."""
    run = separate("-m", "lightning_prune", "compare", *images_of(folder), *DDP, f"--output={tmp_path / 'two'}")
    assert run.returncode == 0, run.stderr
    assert main(["compare", *images_of(folder), f"--output={tmp_path / 'one'}"]) == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("one", "two"))
    timed = (
        "latency_low_ms",
        "latency_high_ms",
        "latency_ms",
        "latency_p90_ms",
        "latency_spread",
        "speedup",
        "speedup_spread",
        "speedup_vs_eager",
    )
    timed += ("throughput", "throughput_end_to_end", "peak_memory_mib", "note")  # which may be of page faults
    same = [name for name in COLUMNS if name not in timed]
    assert [[row[key] for key in same] for row in two] == [[row[key] for key in same] for row in one]
    assert [row["variant"] for row in two] == ["dense", "pomt given"]
    assert all(0 < row["top5"] < 1 for row in two)
    schedules = [lp.Schedule.load(tmp_path / name / "schedules" / "pomt-given.yaml") for name in ("one", "two")]
    assert schedules[0] == schedules[1]
    assert run.stdout.count("Written: ") == 1
