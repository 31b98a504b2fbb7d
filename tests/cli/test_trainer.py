"""The methods of PruneTrainer, called from Python."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

import lightning_prune as lp
from helpers.clock import set_latency
from helpers.models import digits_module
from lightning_prune.callbacks import TokenPruning
from lightning_prune.cli.trainer import PruneTrainer
from lightning_prune.profiling import DENSE


def set_clockwork(monkeypatch: pytest.MonkeyPatch, dense: float = 0.2) -> None:
    """1 ms per token, with a cliff of 60 ms below 108 tokens."""

    def seconds(alternative: Any) -> float:
        if isinstance(alternative, int):
            return (alternative + 60 * (alternative >= 108)) / 1e3
        return dense if alternative in ("dense", DENSE) else 0.1

    set_latency(monkeypatch, seconds)


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clockwork(monkeypatch)


def trainer(*callbacks: L.Callback, **options: Any) -> PruneTrainer:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return PruneTrainer(accelerator="cpu", callbacks=list(callbacks), **{**settings, "limit_val_batches": 2, **options})


def pruner(**settings: Any) -> TokenPruning:
    defaults = {"method": "pomt", "objective": lp.Utility(), "calibration": 8, "time_limit": 1, "verbose": False}
    return TokenPruning(**{**defaults, **settings})


@pytest.mark.usefixtures("drawn")
def test_profile_measures_writes_and_restores_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, model = pruner(block=2, method="random"), digits_module()
    running = trainer(callback)
    attached = list(running.callbacks)
    profile = running.profile(model, datamodule=lp.DigitsData(batch_size=8), output=str(tmp_path / "out"))
    assert (profile.method, profile.block, profile.depth, profile.dense_tokens) == ("random", 2, 4, 197)
    assert profile.context["batch_size"] == 8
    assert lp.LatencyProfile.load(tmp_path / "out" / "profile.json") == profile
    assert (tmp_path / "out" / "profile.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["profile.json", "profile.png"]
    assert (running.callbacks, running.limit_val_batches, callback.enabled) == (attached, 2, True)
    assert callback.decision is None
    assert type(model.model.blocks[2]).__name__ == "Block"
    printed = capsys.readouterr().out
    assert "batch 8, float32" in " ".join(printed.split())
    assert "257.00 ± 0.00" in printed
    assert "Cliffs: " in printed
    assert "-> " in printed.split("Cliffs: ")[1]
    assert "Written: " in printed


def test_profile_without_a_batch(tmp_path: Path) -> None:
    with pytest.raises(lp.DataError, match=r"^The validation loader must yield at least one batch, got none"):
        trainer(pruner()).profile(digits_module(), dataloaders=[], output=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_compare_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = trainer(pruner()).compare(digits_module(), datamodule=lp.DigitsData(batch_size=8), output=str(tmp_path))
    assert {path.name for path in found.files} < {path.name for path in tmp_path.iterdir()}
    with (tmp_path / "results.csv").open(newline="") as stream:
        assert [line["variant"] for line in csv.DictReader(stream)] == [row.variant for row in found.rows]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document == json.loads(json.dumps(found.to_dict()))
    assert document["command"] == "trainer.compare(methods=None, speedups=None, runtimes=None)"
    printed = capsys.readouterr().out
    for words in (
        "dense",
        "pomt utility",
        "Planning took",
        "results.csv",
        f"schedule.yaml is that of {found.best.variant}",
    ):
        assert words in printed


def test_compare_prints_that_the_profile_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clockwork(monkeypatch, dense=0.257)  # as the profile says, so that it still holds
    data, line = lp.DigitsData(batch_size=8), "The latency profile was measured 20"
    trainer(pruner(verbose=True)).compare(digits_module(), datamodule=data, output=str(tmp_path / "first"))
    assert line not in capsys.readouterr().out
    trainer(pruner(verbose=True)).compare(digits_module(), datamodule=data, output=str(tmp_path / "second"))
    assert line in capsys.readouterr().out


def test_the_config_is_that_of_the_callback_or_default() -> None:
    callback = pruner(seed=3)
    assert trainer(callback).config is callback.config
    running = trainer()
    assert running.config.seed == 0
    assert not [each for each in running.callbacks if isinstance(each, TokenPruning)]


class Counting(L.Callback):
    """Numbers of tokens after the last block in each validation."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.hook = pl_module.model.norm.register_forward_pre_hook(lambda _, args: self.tokens.append(args[0].shape[1]))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.hook.remove()


def test_a_command_leaves_no_pruning_on_the_trainer(tmp_path: Path) -> None:
    """A trainer without `TokenPruning` validates the dense model, also after `profile`."""
    running, module, data = trainer(), digits_module(), lp.DigitsData(batch_size=8)
    callbacks = list(running.callbacks)
    running.profile(module, datamodule=data, output=str(tmp_path), device="simulated:multiprocessors=8,tile=64")
    assert running.callbacks == callbacks
    counting = Counting()
    running.callbacks.append(counting)
    running.validate(module, datamodule=data, verbose=False)
    assert set(counting.tokens) == {197}


class Stop(Exception):
    pass


class Interrupting(L.Callback):
    def __init__(self) -> None:
        self.armed = True

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.armed:
            raise Stop

    def on_predict_batch_end(self, *_: Any) -> None:
        raise Stop


def settings_of(callback: L.Callback) -> dict[str, Any]:
    """All attributes except those that are set in every run: by Lightning, and whether the run is that of a command."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict", "_is_idle")}


@pytest.mark.parametrize("command", ["profile", "plan", "compare", "compare methods", "export", "vocabulary"])
def test_a_failed_command_restores_callback_and_trainer(command: str, tmp_path: Path) -> None:
    callback = TokenPruning("pomt", time_limit=0.1, calibration=8, verbose=False)
    running, module = trainer(callback, Interrupting()), digits_module()
    before, callbacks, limit = settings_of(callback), list(running.callbacks), running.limit_val_batches
    name, _, methods = command.partition(" ")
    options: dict[str, Any] = {"methods": ["random"], "speedups": [1.5]} if methods else {}
    options |= (
        {"schedule": str(lp.Schedule([0, 9, 0, 0], "pomt").save(tmp_path / "s.yaml"))} if name == "export" else {}
    )
    output = str(tmp_path / ("words.safetensors" if command == "vocabulary" else "out"))
    with pytest.raises(Stop):
        getattr(running, name)(module, datamodule=lp.DigitsData(batch_size=8), output=output, **options)
    assert settings_of(callback) == before
    assert running.callbacks == callbacks
    assert running.limit_val_batches == limit
    assert type(module.model.blocks[1]).__name__ == "Block"


@pytest.mark.parametrize("where", ["callbacks", "configure_callbacks"])
def test_the_callback_is_idle_during_a_command(where: str, tmp_path: Path) -> None:
    """Also a callback that the module configures."""
    callback, module, counting = pruner(schedule=50), digits_module(), Counting()
    if where == "configure_callbacks":
        module.configure_callbacks = lambda: [callback]
    running = trainer(counting, *([callback] if where == "callbacks" else []))
    running.profile(
        module,
        datamodule=lp.DigitsData(batch_size=8),
        output=str(tmp_path),
        device="simulated:multiprocessors=8,tile=64",
    )
    assert callback.decision is None
    assert counting.tokens[-1] == 197  # the step of the batch that was profiled on


def test_compare_logs_each_variant_under_its_own_name(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs", version=0)
    running = trainer(pruner(schedule=50), logger=logger)
    found = running.compare(digits_module(), datamodule=lp.DigitsData(batch_size=8), output=str(tmp_path / "out"))
    with next((tmp_path / "logs").rglob("metrics.csv")).open(newline="") as stream:
        logged = {key: value for line in csv.DictReader(stream) for key, value in line.items() if value}
    assert float(logged["compare/pomt given/latency_ms"]) == pytest.approx(found.rows[1].latency_ms)
    assert float(logged["compare/dense/top1"]) == pytest.approx(found.rows[0].top1)
    assert float(logged["compare/pomt given/removed"]) == 50


def test_compare_with_methods_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(alternative: Any) -> float:
        if isinstance(alternative, int):  # of the latency profile
            return 4e-3 * alternative
        schedule = alternative.schedule
        return 1e-3 * (sum(schedule.tokens(197)) if isinstance(schedule, lp.Schedule) else 4 * 197)

    set_latency(monkeypatch, seconds, runs=False)
    logger = CSVLogger(tmp_path / "logs", version=0)
    found = trainer(pruner(), logger=logger).compare(
        digits_module(),
        datamodule=lp.DigitsData(batch_size=8),
        output=str(tmp_path / "out"),
        methods=["random"],
        speedups=[1.5],
    )
    assert [row.variant for row in found.rows] == ["dense", "random 1.5x"]
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["rows"] == [row.to_dict() for row in found.rows]
    assert document["command"] == "trainer.compare(methods=['random'], speedups=[1.5], runtimes=None)"
    with next((tmp_path / "logs").rglob("metrics.csv")).open(newline="") as stream:
        logged = {key: value for line in csv.DictReader(stream) for key, value in line.items() if value}
    assert float(logged["compare/random 1.5x/speedup"]) == pytest.approx(found.rows[1].speedup)


@pytest.mark.parametrize("settings", [{}, {"methods": ["random"], "speedups": [1.5]}])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_brackets_in_file_names_are_printed(settings: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    callback = pruner() if not settings else TokenPruning(time_limit=1, verbose=False)
    output = tmp_path / "[" / "bold]"
    trainer(callback).compare(digits_module(), datamodule=lp.DigitsData(batch_size=8), output=str(output), **settings)
    assert f"Written: {output / 'results.csv'}" in capsys.readouterr().out
