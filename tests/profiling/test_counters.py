"""Counters against a tree of files, and modules, that stand in for the hardware."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_prune.errors import DataError
from lightning_prune.profiling.energy_meter import (
    NO_COUNTER,
    NOT_READABLE,
    NoCounterError,
    NvmlCounter,
    RaplCounter,
    Unavailable,
    ZeusCounter,
    device_counter,
    find_counter,
)

RANGE = 1_000_000  # microjoules at which the counter of a zone starts again from 0
UUID = "6c1f4b9e-0000-1111-2222-333344445555"


def zone(root: Path, name: str, label: str, energy: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return folder / "energy_uj"


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """Two processors with zones inside, the platform that has both in it, and what counts a processor twice."""
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:0:1", "dram", 5)
    zone(tmp_path, "intel-rapl:2", "psys", 5)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    (tmp_path / "intel-rapl").mkdir()
    return [zone(tmp_path, "intel-rapl:0", "package-0", 100), zone(tmp_path, "intel-rapl:1", "package-1", 999_000)]


def test_rapl_adds_packages_and_counts_on_where_one_starts_again(tmp_path: Path, packages: list[Path]) -> None:
    counter = RaplCounter(tmp_path)
    readings = [(100, 999_000), (500_100, 999_500), (900_000, 200), (899_999, 200), (0, RANGE)]
    expected, total, last = [], 0, readings[0]
    for now in readings:
        for one, before in zip(now, last, strict=True):
            total += one - before if one >= before else one - before + RANGE
        expected.append(total / 1e6)
        last = now
    found = []
    for now in readings:
        for path, energy in zip(packages, now, strict=True):
            path.write_text(str(energy))
        found.append(counter.joules())
    assert found == pytest.approx(expected)
    assert found == sorted(found)
    assert found[2] == pytest.approx(0.8999 + 0.0012)


def test_no_rapl(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NoCounterError, match=f"^no RAPL package zone in {root}$"):
            RaplCounter(root)
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    with pytest.raises(NoCounterError, match=r"^no RAPL package zone"):
        RaplCounter(tmp_path)


def test_rapl_that_only_root_may_read(tmp_path: Path, packages: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return os.fsdecode(path.read_bytes())

    monkeypatch.setattr(Path, "read_text", denied)
    found = find_counter("cpu", tmp_path, lambda seconds: None)
    assert isinstance(found, Unavailable)
    assert str(found) == NOT_READABLE == "n/a (the energy counter of this device is not readable by this user)"
    assert found.reason.startswith(f"{packages[0]} may be read by root only; ")


def test_rapl_that_is_broken(tmp_path: Path, packages: list[Path]) -> None:
    counter = RaplCounter(tmp_path)
    packages[0].write_text("")
    with pytest.raises(DataError, match=r"^The energy counter .*intel-rapl:0/energy_uj cannot be read any more: "):
        counter.joules()
    with pytest.raises(NoCounterError, match=r"^RAPL cannot be read: "):
        RaplCounter(tmp_path)


def test_a_counter_is_found_if_it_moves(tmp_path: Path, packages: list[Path]) -> None:
    waited: list[float] = []

    def working(seconds: float) -> None:
        waited.append(seconds)
        packages[0].write_text("4000")

    counter = find_counter("cpu", tmp_path, working)
    assert isinstance(counter, RaplCounter)
    assert waited == [0.002]
    found = find_counter(torch.device("cpu"), tmp_path, lambda seconds: None)
    assert isinstance(found, Unavailable)
    assert str(found) == NO_COUNTER
    assert "RAPL (processor packages) stands still" in found.reason


def test_devices_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus", None)
    reasons = {
        "cpu": f"no RAPL package zone in {tmp_path}; zeus is not installed",
        "mps": "zeus is not installed",
        "meta": "none is known for meta devices",
    }
    for device, reason in reasons.items():
        found = find_counter(device, tmp_path)
        assert found == Unavailable("n/a (no energy counter on this device)", reason)
    device_counter.cache_clear()
    assert device_counter(torch.device("meta")) is device_counter(torch.device("meta"))


class FakeNVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pynvml on a machine whose second GPU is torch's first."""
    module: Any = ModuleType("pynvml")
    module.NVMLError = FakeNVMLError
    module.nvmlInit = lambda: None
    module.energy = {"GPU-other": 7, f"GPU-{UUID}": 250_000}

    def handle(uuid: str) -> str:
        if uuid not in module.energy:
            raise FakeNVMLError("Not Found")
        return uuid

    def energy(handle: str) -> int:
        if module.energy[handle] is None:
            raise FakeNVMLError("Not Supported")
        return int(module.energy[handle])

    module.nvmlDeviceGetHandleByUUID = handle
    module.nvmlDeviceGetUUID = handle
    module.nvmlDeviceGetTotalEnergyConsumption = energy
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.version, "hip", None)
    return module


def test_nvml_by_uuid(nvml: Any) -> None:
    counter = NvmlCounter(torch.device("cuda", 0))
    assert counter.joules() == 250.0
    nvml.energy[f"GPU-{UUID}"] = 251_500
    assert counter.joules() == 251.5
    nvml.energy[f"GPU-{UUID}"] = None
    with pytest.raises(DataError, match=r"^The energy counter of the GPU cannot be read any more: Not Supported$"):
        counter.joules()


def test_a_gpu_is_found(nvml: Any) -> None:
    def working(seconds: float) -> None:
        assert seconds == 0.2
        nvml.energy[f"GPU-{UUID}"] += 10

    assert isinstance(find_counter("cuda:0", sleep=working), NvmlCounter)


@pytest.mark.parametrize(("energy", "reason"), [({}, "Not Found"), ({f"GPU-{UUID}": None}, "Not Supported")])
def test_a_gpu_without_counter(nvml: Any, energy: dict[str, Any], reason: str) -> None:
    """A slice of a GPU, or one before Volta."""
    nvml.energy = energy
    found = find_counter("cuda")
    assert found == Unavailable(NO_COUNTER, f"zeus is not installed; NVML: {reason}")


def test_a_gpu_of_another_maker(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(NoCounterError, match=r"^cuda:0 is no NVIDIA GPU$"):
        NvmlCounter(torch.device("cuda", 0))


def test_the_extra_is_named(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = find_counter("cuda")
    assert isinstance(found, Unavailable)
    assert found.reason.endswith("nvidia-ml-py is not installed; pip install 'lightning-prune[energy]'")


class FakeZeusError(Exception):
    pass


class Jetson:
    """A chip that has everything on it."""

    def __init__(self, **millijoules: float | None) -> None:
        self.measured = SimpleNamespace(**millijoules)

    def get_total_energy_consumption(self) -> SimpleNamespace:
        return self.measured


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> Any:
    """zeus 0.16 on a machine with nothing to count."""

    def nothing() -> Any:
        raise FakeZeusError("Nothing found.")

    package, devices, errors = ModuleType("zeus"), ModuleType("zeus.device"), ModuleType("zeus.exception")
    fake: Any = devices
    fake.get_soc = fake.get_gpus = fake.get_cpus = nothing
    vars(errors)["ZeusBaseError"] = FakeZeusError
    for module in (package, devices, errors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


def test_zeus_without_anything(zeus: Any) -> None:
    for device in ("cpu", "cuda"):
        with pytest.raises(NoCounterError, match=r"^zeus: Nothing found\.$"):
            ZeusCounter(torch.device(device))
    with pytest.raises(NoCounterError, match=r"^zeus knows no counter of mps$"):
        ZeusCounter(torch.device("mps"))


def test_zeus_on_a_gpu(zeus: Any, nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """zeus lists GPUs in the order of the bus, torch by speed."""
    names = ["GPU-other", f"GPU-{UUID}"]
    gpus = SimpleNamespace(
        gpus=[SimpleNamespace(handle=name) for name in names],
        get_total_energy_consumption=lambda index: nvml.energy[names[index]],
    )
    zeus.get_gpus = lambda: gpus
    counter = ZeusCounter(torch.device("cuda", 0))
    assert (counter.name, counter.joules()) == ("zeus (GPU board)", 250.0)
    names[1] = "GPU-third"
    gpus.gpus[1].handle = "GPU-other"
    with pytest.raises(NoCounterError, match=f"^zeus does not list GPU-{UUID}$"):
        ZeusCounter(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    nvml.energy["GPU-third"] = 9_000
    assert ZeusCounter(torch.device("cuda", 1)).joules() == 9.0


def test_zeus_comes_before_nvml_and_after_rapl(zeus: Any, nvml: Any, tmp_path: Path) -> None:
    ticks = iter(range(0, 10_000, 500))
    zeus.get_soc = lambda: SimpleNamespace(
        get_total_energy_consumption=lambda: SimpleNamespace(total_energy_mj=float(next(ticks)))
    )
    for device in ("cuda", "cpu", "mps"):
        assert isinstance(find_counter(device, tmp_path, lambda seconds: None), ZeusCounter)


def test_zeus_on_processors(zeus: Any) -> None:
    class Processors(list[float]):
        def get_total_energy_consumption(self, index: int) -> SimpleNamespace:
            if self[index] < 0:
                raise FakeZeusError("The daemon is gone.")
            return SimpleNamespace(cpu_mj=self[index], dram_mj=None)

    processors = Processors([1500.0, 500.0])
    zeus.get_cpus = lambda: processors
    counter = ZeusCounter(torch.device("cpu"))
    assert (counter.name, counter.joules()) == ("zeus (processor packages)", 2.0)
    processors[0] = -1
    with pytest.raises(DataError, match=r"^The energy counter of zeus cannot be read any more: The daemon is gone\.$"):
        counter.joules()


@pytest.mark.parametrize(
    ("measured", "joules"),
    [
        ({"total_energy_mj": 5000.0, "gpu_energy_mj": 1.0}, 5.0),
        ({"cpu_total_mj": 1000.0, "gpu_mj": 500.0, "dram_mj": None, "ane_mj": 250.0}, 1.75),
    ],
)
def test_zeus_on_a_chip(zeus: Any, measured: dict[str, Any], joules: float) -> None:
    zeus.get_soc = lambda: Jetson(**measured)
    counter = ZeusCounter(torch.device("mps"))
    assert (counter.name, counter.joules()) == ("zeus (Jetson)", joules)


def test_zeus_on_a_chip_that_tells_parts_only(zeus: Any) -> None:
    zeus.get_soc = lambda: Jetson(total_energy_mj=None, gpu_energy_mj=1.0)
    with pytest.raises(NoCounterError, match=r"^zeus: SimpleNamespace holds no energy of the whole chip$"):
        ZeusCounter(torch.device("cuda"))
