"""The report on the machine: its sections, and what breaks in one of them stays there."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_prune._utils.readings import NotReadable
from lightning_prune.profiling import machine_report
from lightning_prune.profiling.energy_counter import Unavailable
from lightning_prune.profiling.installation_report import cache_facts, energy_counters, same_build, torch_facts
from lightning_prune.runtimes import found_devices as runtimes
from lightning_prune.runtimes.registry import known_runtimes

MODULE = "lightning_prune.profiling.installation_report"


def test_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.energy_counters", lambda: 1 / 0)
    report = machine_report(timing=False, root=tmp_path)
    assert "noise" not in report
    assert {"system", "processor", "limits", "state", "load", "versions", "torch", "runtimes", "folders"} <= set(report)
    assert list(report)[-1] == "features"
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["torch"]["torchvision"].endswith("run")
    assert set(report["runtimes"]) == set(known_runtimes())
    assert report["runtimes"]["onnxruntime"]["CPUExecutionProvider"] == "ready"
    assert report["energy"] == {"all": NotReadable("ZeroDivisionError: division by zero")}
    assert isinstance(report["state"]["governor"], NotReadable)


def test_the_noise_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.noise_of_machine", lambda seconds: {"asked": seconds})
    monkeypatch.setattr(f"{MODULE}.devices_of_runtimes", dict)
    monkeypatch.setattr(f"{MODULE}.energy_counters", dict)
    assert machine_report(seconds=0.5)["noise"] == {"asked": 0.5}


def test_the_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "a" / "b"))
    assert (cache_facts()["exists"], cache_facts()["files"]) == (False, 0)
    assert cache_facts()["free_gib"] > 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.json").write_bytes(bytes(2**20))
    facts = cache_facts()
    assert (facts["exists"], facts["files"], facts["size_mib"]) == (True, 1, 1.0)


def test_torchvision_of_another_build_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setattr(torchvision, "__version__", "0.27.0+other")
    assert "not of the build" in str(same_build())

    def broken(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    assert str(same_build()).endswith("RuntimeError: operator torchvision::nms does not exist")

    def silent(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(torchvision.ops, "nms", silent)
    assert "RuntimeError" in str(same_build())


def test_a_fact_of_torch_that_cannot_be_read_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.sums_saturate", lambda: 1 / 0)
    facts = torch_facts()
    assert facts["int8_sums_saturate"] == NotReadable("ZeroDivisionError: division by zero")
    assert facts["threads"] == torch.get_num_threads()


@pytest.fixture
def _two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator with two devices, of which the second has no name."""

    def named(device: torch.device) -> str:
        if device.index == 1:
            raise RuntimeError("device lost")
        return f"{device} here"

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(runtimes, "device_name", named)


@pytest.mark.usefixtures("_two_devices")
def test_a_device_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = NotReadable("RuntimeError: device lost")
    assert runtimes.torch_devices() == {"cpu": "cpu here", "cuda:0": "cuda:0 here", "cuda:1": lost}

    def counter(device: str) -> Unavailable:
        if device == "cuda:0":
            raise RuntimeError("device lost")
        return Unavailable("n/a", f"none of {device}")

    monkeypatch.setattr(f"{MODULE}.find_counter", counter)
    assert energy_counters() == {
        "cpu": NotReadable("none of cpu"),
        "cuda:0": lost,
        "cuda:1": NotReadable("none of cuda:1"),
    }
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1 / 0)
    zero = NotReadable("ZeroDivisionError: division by zero")
    assert runtimes.torch_devices() == {"cpu": "cpu here", "accelerator": zero}
    assert energy_counters() == {"cpu": NotReadable("none of cpu"), "accelerator": zero}


def test_a_device_of_openvino_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        available_devices = ("CPU", "NPU")

        def get_property(self, device: str, name: str) -> str:
            if device == "NPU":
                raise RuntimeError("no driver\nmore")
            return f"{device} {name} "

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    assert runtimes.openvino_devices() == {
        "CPU": "CPU FULL_DEVICE_NAME",
        "NPU": NotReadable("RuntimeError: no driver"),
    }


def test_the_machine_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "box17")
    monkeypatch.setattr(f"{MODULE}.devices_of_runtimes", lambda: {"torch": {"cpu": ["no route to box17"]}})
    monkeypatch.setattr(f"{MODULE}.energy_counters", dict)
    monkeypatch.setenv("LD_PRELOAD", "/scratch/box17/lib.so")
    report = machine_report(timing=False, root=tmp_path)
    assert report["variables"]["LD_PRELOAD"] == "/scratch/<host>/lib.so"
    assert report["runtimes"]["torch"] == {"cpu": ["no route to <host>"]}


def test_each_device_has_a_counter_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.torch_devices", lambda: {"meta": "none"})
    assert isinstance(energy_counters()["meta"], NotReadable)


def test_a_provider_that_does_not_load_is_told_from_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    named = ["CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: named)

    class Session:
        def __init__(self, model: bytes, options: object, providers: list[str]) -> None:
            assert providers == ["CUDAExecutionProvider"]

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    found = runtimes.onnx_providers()
    assert found["CPUExecutionProvider"] == "ready"
    assert found["CUDAExecutionProvider"] == "in the build, but a session has CPUExecutionProvider"
    assert found["AzureExecutionProvider"] != "ready"


def test_a_runtime_that_is_broken_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(runtimes, "parse_runtime", broken)
    assert "libfoo.so.1" in str(runtimes.devices_of_runtimes()["openvino"])
