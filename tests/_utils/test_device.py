import pytest
import torch

from lightning_prune._utils.device import between_runs, synchronize


def test_synchronize_does_nothing_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: pytest.fail("raises for a CPU"))
    synchronize(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_synchronize_waits_for_an_accelerator(monkeypatch, kind):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    synchronize(torch.device(kind, 1))
    assert waited == [torch.device(kind, 1)]


def test_synchronize_waits_for_mps(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    synchronize(torch.device("mps"))
    assert waited == ["mps"]


def test_between_runs_the_device_is_idle_and_nothing_is_cast(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(device.type))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: waited.append("casts"))
    between_runs(torch.device("cuda"))()
    assert waited == ["casts", "cuda"]
