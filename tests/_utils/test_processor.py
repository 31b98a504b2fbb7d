import os

import pytest

from lightning_prune._utils import processor
from lightning_prune._utils.processor import processor_name, usable_cores


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"/proc/cpuinfo": "processor\t: 0\nmodel name\t: Abacus 9\n"}, "Abacus 9"),
        ({"/proc/cpuinfo": "Hardware\t: BCM2835\n", "/proc/device-tree/model": "A board\0"}, "BCM2835"),
        ({"/proc/cpuinfo": "processor\t: 0\n", "/proc/device-tree/model": "Raspberry Pi 5\0"}, "Raspberry Pi 5"),
        ({}, "arm64"),
    ],
)
def test_the_name_is_that_of_the_processor_else_of_the_board(monkeypatch, tmp_path, files, name):
    def path(where):
        return tmp_path / where.strip("/").replace("/", "_")

    for where, text in files.items():
        path(where).write_text(text)
    monkeypatch.setattr(processor, "Path", path)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert processor_name() == name


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cores() == 7
