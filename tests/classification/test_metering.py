"""Energy of a run in a Trainer, with a fake counter and clock."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ImageClassifier
from lightning_prune.classification import evaluation as metering
from lightning_prune.classification.evaluation import EnergyMeter
from lightning_prune.profiling.energy_counter import NO_COUNTER, Unavailable

WATTS = 20.0


class Machine:
    """A counter with constant power."""

    name, resolution = "fake", 0.02

    def __init__(self) -> None:
        self.now = 100.0
        self.began: dict[str, float] = {}

    def begin(self, window: str) -> None:
        self.began[window] = self.now

    def end(self, window: str) -> float:
        return WATTS * (self.now - self.began.pop(window))

    def clock(self) -> float:
        return self.now


def metered(machine: Machine, batches: list[float], warmup: int = 2, images: int = 4, **more: Any) -> Any:
    meter = EnergyMeter(more.pop("counter", machine), warmup, clock=machine.clock, **more)
    for seconds in batches:
        meter.begin(images)
        machine.now += seconds
    return meter.finish()


def test_energy_is_measured_from_the_end_of_warmup() -> None:
    found = metered(Machine(), [9.0, 9.0, 0.5, 0.75, 0.25])
    assert found == pytest.approx((WATTS * 1.5, 12, 1.5))
    assert metered(Machine(), [2.0], warmup=0) == pytest.approx((WATTS * 2, 4, 2.0))


@pytest.mark.parametrize("batches", [[], [9.0], [9.0, 9.0], [9.0, 9.0, 0.5, 0.49]])
def test_short_runs_have_no_result(batches: list[float]) -> None:
    assert metered(Machine(), batches) is None


def test_all_processes_log_or_none() -> None:
    conditions: list[bool] = []

    def disagree(mine: bool) -> bool:
        conditions.append(mine)
        return False

    assert metered(Machine(), [2.0], warmup=0, agree=disagree) is None
    assert conditions == [True]


def test_a_process_that_shares_its_counter_reports_images_only() -> None:
    assert metered(Machine(), [2.0], warmup=0, counter=None) == pytest.approx((0.0, 4, 2.0))


def test_a_window_is_opened_after_warmup_and_closed_at_the_end() -> None:
    machine = Machine()
    meter = EnergyMeter(machine, 1, clock=machine.clock)
    meter.begin(4)
    assert not machine.began
    meter.begin(4)
    assert len(machine.began) == 1
    meter.finish()
    assert not machine.began


class Slow(nn.Module):
    """A classifier that takes 0.25 s per batch on the fake clock."""

    num_classes = 3

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = [machine]
        self.layer = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.machine[0].now += 0.25
        out: torch.Tensor = self.layer(images.flatten(1))
        return out


def run(monkeypatch: pytest.MonkeyPatch, counter: Any, machine: Machine, batches: int, stage: str = "validate") -> Any:
    monkeypatch.setattr(metering, "device_counter", lambda device: counter)
    monkeypatch.setattr(metering, "EnergyMeter", partial(EnergyMeter, clock=machine.clock))
    module = ImageClassifier(Slow(machine), warmup=1)
    data = DataLoader(TensorDataset(torch.zeros(2 * batches, 1, 2, 2), torch.zeros(2 * batches, dtype=torch.long)), 2)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **quiet)
    (found,) = getattr(trainer, stage)(module, data, verbose=False)
    assert module.evaluation.meter is None
    return found


@pytest.mark.parametrize(("stage", "prefix"), [("validate", "val"), ("test", "test")])
@pytest.mark.filterwarnings("ignore:.*Throughput|Latency|does not have many workers")
def test_a_trainer_logs_energy(monkeypatch: pytest.MonkeyPatch, stage: str, prefix: str) -> None:
    machine = Machine()
    found = run(monkeypatch, machine, machine, batches=6, stage=stage)
    assert found[f"{prefix}/joules_per_image"] == pytest.approx(WATTS * 0.25 / 2)
    assert found[f"{prefix}/watts"] == pytest.approx(WATTS)


@pytest.mark.parametrize(("counted", "batches"), [(True, 3), (False, 6)])
@pytest.mark.filterwarnings("ignore:.*Throughput|Latency|does not have many workers")
def test_energy_is_not_logged_without_a_counter_or_in_short_runs(
    monkeypatch: pytest.MonkeyPatch, counted: bool, batches: int
) -> None:
    machine = Machine()
    found = run(monkeypatch, machine if counted else Unavailable(NO_COUNTER, "none"), machine, batches)
    assert "val/top1" in found
    assert not {"val/joules_per_image", "val/watts"} & set(found)


@pytest.mark.parametrize(
    ("device", "local_rank", "everywhere", "joules"),
    [("cpu", 0, True, 40.0), ("cpu", 1, True, 0.0), ("cuda", 1, True, 40.0), ("cpu", 0, False, None)],
)
def test_the_first_process_of_a_machine_measures(
    monkeypatch: pytest.MonkeyPatch, device: str, local_rank: int, everywhere: bool, joules: float | None
) -> None:
    """Processes of a machine share its processor, but each has its own GPU."""
    machine = Machine()
    monkeypatch.setattr(metering, "device_counter", lambda device: machine)
    monkeypatch.setattr(metering, "EnergyMeter", partial(EnergyMeter, clock=machine.clock))
    strategy = SimpleNamespace(
        root_device=torch.device(device), reduce_boolean_decision=lambda mine, all=True: mine and all and everywhere
    )
    trainer: Any = SimpleNamespace(strategy=strategy, local_rank=local_rank)
    meter = metering.meter_of(trainer, warmup=0)
    assert (meter is None) is (joules is None)
    if meter is not None:
        meter.begin(4)
        machine.now += 2
        assert meter.finish() == pytest.approx((joules, 4, 2.0))


def test_a_copy_has_no_meter() -> None:
    module = ImageClassifier(Slow(Machine()))
    module.evaluation.meter = EnergyMeter(Machine(), 0)
    vars(module.evaluation.meter)["handle"] = lambda: None  # as of a library in C, cannot be pickled
    for other in (copy.deepcopy(module.evaluation), pickle.loads(pickle.dumps(module.evaluation))):
        assert other.meter is None
    assert module.evaluation.meter is not None
