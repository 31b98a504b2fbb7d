"""`plan` and `profile`, as methods and as commands: on this device, from a file, and for a simulated device."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

import lightning_prune as lp
from helpers.clock import set_latency
from helpers.models import DEPTH, digits_module
from lightning_prune import DigitsData, ImageClassifier, TokenPruning
from lightning_prune._utils.device import device_name
from lightning_prune.cli.main import run
from lightning_prune.cli.trainer import PruneTrainer
from lightning_prune.planning.method_selection import AUTO_METHODS
from lightning_prune.profiling import DENSE, SimulatedDevice, Workload, profile_reuse
from lightning_prune.profiling.simulation import simulated_seconds

DEVICE = "simulated:multiprocessors=9"
QUICK = ["--prune.time_limit", "1", "--prune.calibration", "16", "--prune.verbose", "false"]
DATA = ["--config", "configs/digits.yaml", "--data.batch_size", "4"]


def trainer(**kwargs):
    seed_everything(0, verbose=False)
    defaults = {"method": "pomt", "objective": lp.Utility(), "calibration": 16, "time_limit": 1.0, "verbose": False}
    callback = TokenPruning(**{**defaults, **kwargs})
    return PruneTrainer(callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture(scope="module")
def module():
    return digits_module()


@pytest.fixture(scope="module")
def data():
    return DigitsData(batch_size=4)


@pytest.mark.usefixtures("drawn")
def test_plan_for_a_simulated_device_uses_its_latencies(module, data, tmp_path, capsys):
    made = trainer().plan(module, datamodule=data, output=str(tmp_path), device=DEVICE)
    assert made.profile.context["device"] == DEVICE
    assert made.pruned is None
    assert f"Nothing was timed here: the profile is of {DEVICE}" in made.reason
    assert {path.name for path in tmp_path.iterdir()} == {"schedule.yaml", "plan.json", "profile.json", "plan.png"}
    assert lp.Schedule.load(tmp_path / "schedule.yaml").removed == made.schedule.removed
    assert json.loads((tmp_path / "plan.json").read_text())["removed"] == made.total_removed
    assert DEVICE in capsys.readouterr().out
    assert made.total_removed > 0
    work = Workload.of(module.model.blocks, batch=4)
    for milliseconds, schedule in ((made.latency_ms, made.schedule), (made.dense_ms, lp.Schedule([0] * DEPTH))):
        expected = 1e3 * simulated_seconds(SimulatedDevice(multiprocessors=9), work, schedule, 197)
        assert milliseconds == pytest.approx(expected, rel=1e-9)


def test_plan_accepts_a_profile_of_another_device(module, data, tmp_path):
    trainer().profile(module, datamodule=data, output=str(tmp_path / "there"), device=DEVICE)
    with pytest.warns(UserWarning, match="measured elsewhere: device simulated"):
        made = trainer().plan(
            module, datamodule=data, output=str(tmp_path / "here"), profile=str(tmp_path / "there" / "profile.json")
        )
    assert made.profile == lp.LatencyProfile.load(tmp_path / "there" / "profile.json")
    assert (tmp_path / "here" / "schedule.yaml").exists()


@pytest.mark.usefixtures("drawn")
def test_auto_searches_blocks_and_methods_for_another_device(module, data, tmp_path):
    # Four images are soon done; the limit only has to leave time for all methods on a busy machine.
    made = trainer(method="auto", objective=lp.LatencyBudget(speedup=1.3), calibration=4, time_limit=60).plan(
        module, datamodule=data, output=str(tmp_path), device=DEVICE
    )
    assert {entry.method for entry in made.front} - {"mixed"} == set(AUTO_METHODS)
    assert made.profile.method == "random"
    assert made.speedup >= 1.29
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plan_on_this_device_is_timed_against_dense(
    module: ImageClassifier, data: DigitsData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timing (0.2 s dense, 0.08 s pruned) decides, not the profile (1 ms per token)."""

    def seconds(alternative: Any) -> float:
        if isinstance(alternative, int):
            return 1e-3 * alternative
        return 0.2 if alternative in ("dense", DENSE) else 0.08

    set_latency(monkeypatch, seconds)
    made = trainer(objective=lp.Utility(0.9)).plan(module, datamodule=data, output=str(tmp_path))
    assert made.total_removed > 0
    assert made.dense.milliseconds == pytest.approx(200)
    assert made.pruned.milliseconds == pytest.approx(80)
    assert made.speedup == pytest.approx(2.5)


def test_command_and_method_give_the_same_result(tmp_path, capsys):
    there, here = tmp_path / "there", tmp_path / "here"
    assert run(["profile", *DATA, *QUICK, "--device", DEVICE, "--output", str(there)]) == 0
    assert run(["plan", *DATA, *QUICK, "--profile", str(there / "profile.json"), "--output", str(here)]) == 0
    assert (here / "schedule.yaml").exists()
    assert "Cliffs: " in capsys.readouterr().out
    assert run(["plan", *DATA, *QUICK, "--device", "simulated:tiles=3", "--output", str(here)]) == 2
    assert "must be one of multiprocessors" in capsys.readouterr().err


def test_without_the_cache_it_is_measured_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lp.LatencyProfile, "is_inconclusive", False)  # however busy the machine is that tests
    monkeypatch.setattr(profile_reuse, "holds", lambda *_, **__: True)
    command = ["profile", *DATA, *QUICK, "--output", str(tmp_path)]
    run(command)
    run(command)
    assert "--prune.use_cache false measures again" in capsys.readouterr().out
    run([*command, "--prune.use_cache", "false"])
    assert "and kept" not in capsys.readouterr().out


def refused(message):
    return pytest.raises(lp.ArgumentError, match=message)


def test_settings_without_effect_are_rejected(module, data, tmp_path):
    shared = {"datamodule": data, "output": str(tmp_path / "none")}
    with refused("`protocol` must be 'deployed' on a simulated device, got 'paper'"):
        trainer(protocol="paper").profile(module, **shared, device=DEVICE)
    with refused("`schedule` must be left out for `plan`, which plans one, got 56"):
        trainer(schedule=56).plan(module, **shared, device=DEVICE)
    assert not (tmp_path / "none").exists()


def test_the_time_limit_applies_to_the_simulated_clock(module, data, tmp_path):
    slow = f"{DEVICE},gigaflops=0.25"
    short, long = (
        trainer(time_limit=limit).profile(module, datamodule=data, output=str(tmp_path), device=slow)
        for limit in (1.0, 20.0)
    )
    assert short.seconds < long.seconds
    assert short.seconds < 5.0


def test_plan_accepts_a_profile_of_another_batch_size(module, tmp_path):
    """Timings on this device belong to another latency curve."""
    there = trainer().profile(module, datamodule=DigitsData(batch_size=1), output=str(tmp_path), device=DEVICE)
    here = {"device": device_name(torch.device("cpu")), "device_type": "cpu", "threads": torch.get_num_threads()}
    path = replace(there, context={**there.context, **here}).save(tmp_path / "here.json")
    with pytest.warns(UserWarning, match="measured elsewhere: ") as printed:
        made = trainer().plan(
            module, datamodule=DigitsData(batch_size=4), output=str(tmp_path / "plan"), profile=str(path)
        )
    differing = [str(each.message) for each in printed if "measured elsewhere" in str(each.message)]
    assert differing == ["The profile was measured elsewhere: batch_size 1 there, 4 here."]
    assert made.pruned is None
    assert made.profile.tokens == there.tokens
    timed = "Nothing was timed here: the profile is of other conditions (batch_size 1 there, 4 here)."
    assert timed in made.reason


def test_a_profile_without_a_device_is_printed(module, data, tmp_path, capsys):
    there = trainer().profile(module, datamodule=data, output=str(tmp_path), device=DEVICE)
    assert "Simulated: " in capsys.readouterr().out
    path = replace(there, context={"device": "Abacus"}).save(tmp_path / "bare.json")
    with pytest.warns(UserWarning, match="device Abacus there"):
        trainer().plan(module, datamodule=data, output=str(tmp_path / "plan"), profile=str(path))
    assert "Abacus" in capsys.readouterr().out


def test_profile_and_device_together_are_rejected(module, data, tmp_path):
    with pytest.raises(lp.ArgumentError, match=r"`device` must be left out with `profile`, .* got 'simulated:"):
        trainer().plan(module, datamodule=data, output=str(tmp_path), profile="a.json", device=DEVICE)


def test_an_invalid_profile_is_rejected_before_the_run(module, data, tmp_path):
    with pytest.raises(lp.FileFormatError, match="Cannot read"):
        trainer().plan(module, datamodule=data, output=str(tmp_path), profile=str(tmp_path / "none.json"))


def test_a_profile_of_another_model_is_rejected(module, data, tmp_path):
    other = lp.LatencyProfile((9, 50), (1.0, 2.0), (0.1, 0.1), (9, 9), "pomt", 1, DEPTH)
    path: Path = other.save(tmp_path / "profile.json")
    with pytest.raises(lp.ArgumentError, match=r"`profile` must be of this model \(tokens: 197\), .* \(tokens: 50\)"):
        trainer().plan(module, datamodule=data, output=str(tmp_path), profile=str(path))


def test_plan_rejects_the_papers_protocol(module, data, tmp_path):
    with pytest.raises(lp.ArgumentError, match="`protocol` must be 'deployed' for `plan`, got 'paper'"):
        trainer(protocol="paper").plan(module, datamodule=data, output=str(tmp_path))


def test_curves_of_an_earlier_profile_do_not_stay_next_to_a_new_one(module, data, tmp_path):
    folder = str(tmp_path)
    first = trainer().profile(module, datamodule=data, output=folder, device=DEVICE)
    other = replace(first, context={**first.context, "runtime": "onnxruntime:threads=2"})
    of_runtime, copied = (
        other.save(tmp_path / "profile_onnxruntime-threads-2.json"),
        other.save(tmp_path / "profile_edge.json"),
    )
    (tmp_path / "profile_mine.json").write_text("{}")
    trainer().profile(module, datamodule=data, output=folder, device=DEVICE)
    assert not of_runtime.exists()
    assert copied.exists()
    assert (tmp_path / "profile_mine.json").exists()
    kept = str(tmp_path / "profile.json")
    with pytest.warns(UserWarning, match="measured elsewhere"):
        trainer().plan(module, datamodule=data, output=folder, profile=kept)
    assert (tmp_path / "profile.png").exists()  # of the profile that is in the folder
    trainer().plan(module, datamodule=data, output=folder, device="simulated:multiprocessors=4")
    assert not (tmp_path / "profile.png").exists()
    assert copied.exists()


@pytest.mark.parametrize("held", ["results.json", "plan.json", "report.json", "bundle.json"])
def test_results_of_another_kind_are_refused(held, module, data, tmp_path):
    (tmp_path / held).write_text("{}")
    shared = {"datamodule": data, "output": str(tmp_path)}
    with refused(f"`output` must be a folder without .*{held}"):
        trainer().profile(module, **shared, device=DEVICE)
    for command, own in (("plan", "plan.json"), ("compare", "results.json")):
        if held != own:
            with refused(f"`output` must be a folder without .*{held}"):
                getattr(trainer(), command)(module, **shared)
    assert [path.name for path in tmp_path.iterdir()] == [held]
