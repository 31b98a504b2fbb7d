"""The counter of a device as zeus shows it; zeus itself is replaced by one whose figures are known."""

import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_prune.errors import DataError
from lightning_prune.profiling import energy_counter
from lightning_prune.profiling.energy_counter import (
    NO_COUNTER,
    NOT_READABLE,
    EnergyCounter,
    NoCounterError,
    Unavailable,
    ZeusCounter,
    device_counter,
    find_counter,
)

UUID = "6c1f4b9e-0000-1111-2222-333344445555"


class FakeZeusError(Exception):
    """Base of all errors of zeus."""


class FakeZeusNoPermissionError(FakeZeusError):
    """As zeus names what it raises where only root may read."""


class AppleSilicon:
    """A system on a chip."""


class FakeZeus:
    """zeus at its public seam: `zeus.device`, and a `zeus.monitor.ZeusMonitor` that records what it is asked.

    Every device draws 40 W of the clock of the test; GPUs count in steps of a joule.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.watts = 40.0
        self.gpu_uuids = ["GPU-other", f"GPU-{UUID}"]
        self.gpu_has_counter = True
        self.packages: list[int] | Exception = [0, 1]
        self.chip: Any = None
        self.chip_fields: dict[str, float | None] = {}
        self.monitored: tuple[list[int], list[int]] | None = None
        self.synchronised: list[bool] = []
        self.broken = False

    def get_soc(self) -> Any:
        if self.chip is None:
            raise FakeZeusError("No observable SoC was found.")
        return self.chip

    def get_gpus(self) -> Any:
        if not self.gpu_uuids:
            raise FakeZeusError("NVML and AMDSMI unavailable.")
        return SimpleNamespace(
            gpus=[SimpleNamespace(handle=uuid) for uuid in self.gpu_uuids],
            supports_get_total_energy_consumption=lambda index: self.gpu_has_counter,
        )

    def get_cpus(self) -> Any:
        if isinstance(self.packages, Exception):
            raise self.packages
        return SimpleNamespace(cpus=[SimpleNamespace(cpu_index=zone) for zone in self.packages])

    def monitor(self, gpu_indices: list[int], cpu_indices: list[int]) -> Any:
        self.monitored = (gpu_indices, cpu_indices)
        zeus, began = self, {}

        class Monitor:
            def begin_window(self, key: str, sync_execution: bool = True, restart: bool = False) -> None:
                if zeus.broken:
                    raise FakeZeusError("GPU is lost")
                zeus.synchronised.append(sync_execution)
                if key in began and not restart:
                    raise ValueError(f"Measurement window '{key}' already exists")
                began[key] = zeus.now

            def end_window(self, key: str, sync_execution: bool = True) -> Any:
                if zeus.broken:
                    raise FakeZeusError("GPU is lost")
                zeus.synchronised.append(sync_execution)
                joules = zeus.watts * (zeus.now - began.pop(key))
                return SimpleNamespace(
                    gpu_energy=dict.fromkeys(gpu_indices, joules),
                    cpu_energy=dict.fromkeys(cpu_indices, joules) or None,
                    dram_energy=dict.fromkeys(cpu_indices, 7.0) or None,
                    soc_energy=None if zeus.chip is None else SimpleNamespace(**zeus.chip_fields),
                )

        return Monitor()

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch) -> FakeZeus:
    fake = FakeZeus()
    modules: dict[str, dict[str, Any]] = {
        "zeus": {},
        "zeus.device": {"get_soc": fake.get_soc, "get_gpus": fake.get_gpus, "get_cpus": fake.get_cpus},
        "zeus.monitor": {"ZeusMonitor": fake.monitor},
        "zeus.exception": {"ZeusBaseError": FakeZeusError},
        "pynvml": {"nvmlDeviceGetUUID": lambda handle: handle},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.version, "hip", None)
    return fake


def joules_of(counter: EnergyCounter | Unavailable, zeus: FakeZeus, seconds: float) -> float:
    assert not isinstance(counter, Unavailable), counter.reason
    counter.begin("test")
    zeus.sleep(seconds)
    return counter.end("test")


def test_a_gpu_is_found_by_its_uuid(zeus: FakeZeus) -> None:
    """zeus lists GPUs in the order of the bus, torch by speed; the device is synchronised by the caller."""
    counter = find_counter("cuda:0", zeus.sleep)
    assert zeus.monitored == ([1], [])
    assert joules_of(counter, zeus, 2.0) == pytest.approx(80.0)
    assert not isinstance(counter, Unavailable)
    assert counter.name == "zeus (GPU board)"
    assert not any(zeus.synchronised)


def test_a_gpu_of_amd_is_found_by_its_index(zeus: FakeZeus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.2")
    find_counter("cuda:0", zeus.sleep)
    assert zeus.monitored == ([0], [])


def test_packages_are_added_up_without_memory_and_without_the_platform(
    zeus: FakeZeus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zeus lists `psys` like a processor, but it contains the processors."""
    for zone, name in ((0, "package-0"), (1, "psys"), (2, "package-1")):
        (tmp_path / f"intel-rapl:{zone}").mkdir()
        (tmp_path / f"intel-rapl:{zone}" / "name").write_text(f"{name}\n")
    monkeypatch.setattr(energy_counter, "_RAPL", (tmp_path,))
    zeus.packages = [0, 1, 2, 3]  # of the last there is no name
    counter = find_counter("cpu", zeus.sleep)
    assert zeus.monitored == ([], [0, 2, 3])
    assert joules_of(counter, zeus, 2.0) == pytest.approx(3 * 80.0)


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
@pytest.mark.parametrize(
    ("fields", "joules"),
    [
        ({"cpu_energy_mj": 1e3, "gpu_energy_mj": 2e3, "total_energy_mj": 9e3}, 9.0),
        ({"cpu_total_mj": 1e3, "gpu_mj": 2e3, "dram_mj": None, "ane_mj": 500.0, "gpu_sram_mj": 7.0}, 3.5),
    ],
    ids=["jetson", "apple"],
)
def test_a_system_on_a_chip_is_one_counter(
    zeus: FakeZeus, device: str, fields: dict[str, float | None], joules: float
) -> None:
    zeus.chip, zeus.chip_fields = AppleSilicon(), fields
    counter = find_counter(device, zeus.sleep)
    assert joules_of(counter, zeus, 1.0) == pytest.approx(joules)
    assert not isinstance(counter, Unavailable)
    assert counter.name == "zeus (AppleSilicon)"
    assert zeus.monitored == ([], [])


def test_a_chip_without_a_total_is_no_counter(zeus: FakeZeus) -> None:
    zeus.chip, zeus.chip_fields = AppleSilicon(), {"efficiency_core_manager_mj": 3.0}
    found = find_counter("mps", zeus.sleep)
    assert isinstance(found, Unavailable)
    assert "no energy of the whole chip" in found.reason


def test_a_counter_that_stands_still_is_none(zeus: FakeZeus) -> None:
    zeus.watts = 0.0
    assert find_counter("cuda", zeus.sleep) == Unavailable(NO_COUNTER, "zeus (GPU board) does not change")
    assert zeus.now == pytest.approx(2 * ZeusCounter.resolution)


@pytest.mark.parametrize(
    ("device", "change", "text", "reason"),
    [
        ("cuda", {"gpu_uuids": []}, NO_COUNTER, "zeus: NVML and AMDSMI unavailable."),
        ("cuda", {"gpu_uuids": ["GPU-other"]}, NO_COUNTER, f"zeus does not list GPU-{UUID}"),
        ("cuda", {"gpu_has_counter": False}, NO_COUNTER, "the GPU has no energy counter"),
        ("cpu", {"packages": FakeZeusError("RAPL unavailable")}, NO_COUNTER, "zeus: RAPL unavailable"),
        ("cpu", {"packages": FakeZeusNoPermissionError("root only")}, NOT_READABLE, "zeus: root only"),
        ("cpu", {"packages": []}, NO_COUNTER, "RAPL has no processor package"),
        ("mps", {}, NO_COUNTER, "zeus has no counter of mps"),
        ("meta", {}, NO_COUNTER, "there is none for meta devices"),
        ("cuda", {"broken": True}, NO_COUNTER, "The energy counter cannot be read any more: GPU is lost"),
    ],
)
def test_devices_without_a_counter(zeus: FakeZeus, device: str, change: dict[str, Any], text: str, reason: str) -> None:
    vars(zeus).update(change)
    found = find_counter(device, zeus.sleep)
    assert found == Unavailable(text, reason)
    assert str(found) == text


def test_texts_for_tables_say_why_energy_is_unknown() -> None:
    assert NO_COUNTER == "n/a (no energy counter on this device)"
    assert NOT_READABLE == "n/a (the energy counter of this device is not readable by this user)"


def test_a_counter_that_breaks_later_is_an_error(zeus: FakeZeus) -> None:
    counter = ZeusCounter(torch.device("cuda"))
    counter.begin("test")
    zeus.broken = True
    with pytest.raises(DataError, match="GPU is lost"):
        counter.end("test")
    with pytest.raises(DataError, match="GPU is lost"):
        counter.begin("test")


def test_a_window_that_was_never_ended_is_dropped(zeus: FakeZeus) -> None:
    counter = ZeusCounter(torch.device("cpu"))
    counter.begin("test")
    zeus.sleep(100)
    assert joules_of(counter, zeus, 1.0) == pytest.approx(2 * 40.0)


def test_the_extra_is_named_where_zeus_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    for device in ("cpu", "cuda", "mps"):
        found = find_counter(device)
        assert found == Unavailable(NO_COUNTER, "zeus is not installed; pip install 'lightning-prune[energy]'")
    with pytest.raises(NoCounterError, match="zeus is not installed"):
        ZeusCounter(torch.device("cpu"))


def test_a_device_is_searched_once_per_process(zeus: FakeZeus) -> None:
    device_counter.cache_clear()
    assert device_counter(torch.device("meta")) is device_counter(torch.device("meta"))


def test_zeus_itself_has_what_is_used() -> None:
    """The seam that the fake stands for, in the installed zeus, and a search with it on this machine."""
    from zeus.device import get_cpus, get_gpus, get_soc
    from zeus.device.cpu.common import CPU, CPUs, ZeusCPUNoPermissionError
    from zeus.device.gpu.common import GPUs
    from zeus.device.soc.apple import AppleSiliconMeasurement
    from zeus.device.soc.jetson import JetsonMeasurement
    from zeus.exception import ZeusBaseError
    from zeus.monitor import ZeusMonitor
    from zeus.monitor.energy import Measurement

    assert {"gpu_indices", "cpu_indices"} <= set(signature(ZeusMonitor.__init__).parameters)
    assert {"key", "sync_execution", "restart"} <= set(signature(ZeusMonitor.begin_window).parameters)
    assert {"key", "sync_execution"} <= set(signature(ZeusMonitor.end_window).parameters)
    assert {"gpu_energy", "cpu_energy", "soc_energy"} <= {field.name for field in fields(Measurement)}
    assert energy_counter._CHIP_TOTAL in {field.name for field in fields(JetsonMeasurement)}
    assert set(energy_counter._CHIP_PARTS) <= {field.name for field in fields(AppleSiliconMeasurement)}
    assert "cpu_index" in signature(CPU.__init__).parameters
    assert hasattr(GPUs, "supports_get_total_energy_consumption")
    assert all(isinstance(vars(group)[name], property) for group, name in ((CPUs, "cpus"), (GPUs, "gpus")))
    assert issubclass(ZeusCPUNoPermissionError, ZeusBaseError)
    assert all(map(callable, (get_cpus, get_gpus, get_soc)))
    assert find_counter("meta") == Unavailable(NO_COUNTER, "there is none for meta devices")
    found = find_counter("cpu")
    if isinstance(found, Unavailable):
        assert "not installed" not in found.reason
    else:
        found.begin("test")
        assert found.end("test") >= 0
