"""What nvidia-smi prints, read."""

from collections.abc import Sequence

import pytest

from lightning_prune._utils import nvidia_state as module
from lightning_prune._utils.nvidia_state import read_gpus
from lightning_prune._utils.readings import NotReadable

LINE = "NVIDIA H200, 570.86, P0, 1980, 1980, 3201, 41, 120.50, 700.00, 3, Enabled, [N/A], 0x0000000000000044"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def printed_by(words: Sequence[str]) -> str | NotReadable:
        asked.append(words[1])
        return f"{LINE}\n" if "clocks_throttle_reasons" in words[1] else NotReadable("Field is not valid")

    monkeypatch.setattr(module, "printed_by", printed_by)
    gpus = read_gpus()
    assert isinstance(gpus, list)
    assert len(asked) == 2  # the newer name first
    gpu = gpus[0]
    assert (gpu["name"], gpu["sm_mhz"], gpu["celsius"], gpu["watts"]) == ("NVIDIA H200", 1980, 41, 120.5)
    assert gpu["slowed_by"] == ["power cap (software)", "heat (hardware)"]
    assert isinstance(gpu["mig"], NotReadable)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "printed_by", lambda words: NotReadable("nvidia-smi is not installed"))
    assert read_gpus() == NotReadable("nvidia-smi is not installed")
