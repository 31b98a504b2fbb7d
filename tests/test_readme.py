"""The Python of the README runs as it stands."""

import re
from pathlib import Path

import lightning as L
import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_runs(block, tmp_path, monkeypatch):
    """In an empty folder, on a few batches: a reader's own run only takes longer."""
    monkeypatch.chdir(tmp_path)
    init = L.Trainer.__init__

    def few_batches(self, *args, **kwargs):
        quiet = {"logger": False, "limit_val_batches": 2, "enable_progress_bar": False}
        init(self, *args, **{**quiet, **kwargs})

    monkeypatch.setattr(L.Trainer, "__init__", few_batches)
    block = block.replace("TokenPruning(", "TokenPruning(max_seconds=1, calibration=16, ").replace(", )", ")")
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
