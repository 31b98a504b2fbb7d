import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import python_path

PROGRAM = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two processes, which are started once for all tests."""
    target = tmp_path_factory.mktemp("ddp") / "found.json"
    command = [sys.executable, str(PROGRAM), str(target)]
    run = subprocess.run(
        command,
        cwd=target.parent,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(target.with_suffix(f".{rank}").read_text()) for rank in range(2)]
