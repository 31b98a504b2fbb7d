import json
from pathlib import Path
from typing import Any

import pytest

from helpers.fresh import run_ranks

PROGRAM = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two processes, which are started once for all tests."""
    target = tmp_path_factory.mktemp("ddp") / "found.json"
    for run in run_ranks(PROGRAM, str(target), folder=target.parent):
        assert run.returncode == 0, run.stderr
    return [json.loads(target.with_suffix(f".{rank}").read_text()) for rank in range(2)]
