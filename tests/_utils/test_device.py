import pytest
import torch

from lightning_prune._utils.device import synchronize


def test_a_cpu_needs_no_waiting(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: pytest.fail("raises for a CPU"))
    synchronize(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerator_is_waited_for(monkeypatch, kind):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    synchronize(torch.device(kind, 1))
    assert waited == [torch.device(kind, 1)]


def test_mps_has_a_wait_of_its_own(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    synchronize(torch.device("mps"))
    assert waited == ["mps"]
