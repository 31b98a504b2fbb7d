"""CPU time as a clock: what runs are timed by, what time limits stay, and where it is refused."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.callbacks import TokenPruning
from lightning_prune.profiling import InterleavedTimer, ProfileStore
from lightning_prune.profiling.clocks import CpuClock, clock_name, read_clock
from lightning_prune.profiling.environment import measurement_context
from lightning_prune.profiling.profile_reuse import get_or_profile
from lightning_prune.report.plots import plot_profile
from lightning_prune.report.tables import profile_table, remarks

IMAGES = noise_images(2)


class Clock(CpuClock):
    """Runs take 2 s of CPU time, and 8 s of wall time."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> float:
        return 8.0 * self.runs

    def of_run(self) -> float:
        return 2.0 * self.runs

    def run(self) -> None:
        self.runs += 1


def test_runs_are_timed_by_cpu_time_and_limits_by_wall_time() -> None:
    clock = Clock()
    timer = InterleavedTimer[str](lambda _: None, clock.run, lambda: None, "dense", clock)
    assert timer.measure([], rounds=100, deadline=5 * 8.0) == 5  # a warm-up, and the round that begins at the limit
    assert timer.result("dense").milliseconds == 2000
    assert timer.pace == 4


def test_cpu_time_is_that_of_the_process() -> None:
    timer = InterleavedTimer[str](lambda _: None, lambda: time.sleep(0.05), lambda: None, "dense", read_clock("cpu"))
    timer.measure([], rounds=3)
    assert timer.result("dense").milliseconds < 25


def test_names_and_functions() -> None:
    assert read_clock("wall") is time.perf_counter
    assert read_clock("wall", "cuda") is time.perf_counter
    assert read_clock(time.monotonic, "cuda") is time.monotonic
    assert [clock_name(read_clock(name)) for name in ("wall", "cpu")] == ["wall", "cpu"]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_refused_where_it_says_nothing(device: str) -> None:
    with pytest.raises(lp.ArgumentError, match=f"`clock` must be 'wall' on a {device} device, got 'cpu'"):
        read_clock("cpu", device)


@pytest.mark.parametrize("clock", ["sun", None, 3])
def test_no_clock(clock: object) -> None:
    with pytest.raises(lp.ArgumentError, match="`clock` must be 'wall'"):
        read_clock(clock)
    with pytest.raises(lp.ArgumentError, match="`clock` must be 'wall'"):
        TokenPruning(clock=clock)  # type: ignore[arg-type] # wrong on purpose


def test_a_profile_by_cpu_time_is_no_profile_by_wall_time(tmp_path: Path) -> None:
    store, model = ProfileStore(tmp_path), tiny_vit(depth=2)

    def found(clock: str) -> tuple[str, bool]:
        kept = get_or_profile(model, IMAGES, store, time_limit=0.3, verbose=False, clock=clock)
        return kept.profile.context.get("clock", "wall"), kept.reused

    assert found("cpu") == ("cpu", False)
    assert found("wall") == ("wall", False)


def test_tables_and_plots_say_it() -> None:
    profile = lp.LatencyProfile((9, 17), (5.0, 10.0), (0.1, 0.1), (9, 9), "random", 0, 12, context={"clock": "cpu"})
    for each, quantity in ((profile, "CPU time"), (replace(profile, context={}), "latency")):
        assert profile_table(each).columns[1].header == f"{quantity} ms"
        assert plot_profile(each).axes[0].get_ylabel() == f"{quantity} of a batch [ms], measured"
    document = {"rows": [], "unreached": [], "energy": "n/a", "variants": {}, "context": {"clock": "cpu"}}
    assert remarks(document)[0] == "ms: CPU time of the process, not wall time"
    assert remarks({**document, "context": {}}) == ["energy: n/a"]


def test_a_plan_by_cpu_time_is_not_made_on_a_profile_by_wall_time() -> None:
    model, images = tiny_vit(depth=2), noise_images(8)
    settings = {"calibration": images, "methods": "topk", "time_limit": 2, "verbose": False, "use_cache": False}
    made = lp.plan(model, images[:2], clock="cpu", **settings)
    assert made.profile.context["clock"] == "cpu"
    context = measurement_context(model, images[:2])
    wall = replace(made.profile, context={**made.profile.context, **context, "clock": "wall"})
    with pytest.warns(UserWarning, match="clock wall there, cpu here"):
        other = lp.plan(model, images[:2], clock="cpu", profile=wall, **settings)
    assert other.pruned is None


QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
}  # fmt: skip


def loader() -> Any:
    return torch.utils.data.DataLoader([(image, 0) for image in noise_images(4)], batch_size=2)


def test_the_callback_times_by_it() -> None:
    pruner = TokenPruning("topk", schedule=4, clock="cpu", verbose=False, time_limit=2)
    trainer = L.Trainer(callbacks=[pruner], **QUIET)
    trainer.validate(lp.ImageClassifier(tiny_vit(depth=2)), loader(), verbose=False)
    assert pruner.decision is not None
    assert pruner.decision.context["clock"] == "cpu"


def test_a_comparison_times_by_it(tmp_path: Path) -> None:
    pruner = TokenPruning(calibration=4, verbose=False, time_limit=1, use_cache=False)
    trainer, module = L.Trainer(callbacks=[pruner], **QUIET), lp.ImageClassifier(tiny_vit(depth=2))
    found = lp.compare(trainer, module, loader(), ["topk"], [1.2], clock="cpu", output=tmp_path)
    assert found.plan.context["clock"] == "cpu"
    page = (tmp_path / "report.html").read_text()
    assert "CPU time ms a batch" in page
    with pytest.raises(lp.ArgumentError, match="`clock` must be"):
        lp.compare(trainer, module, loader(), clock="sun")
