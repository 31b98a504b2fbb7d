"""Runs a script as on a device where packages are missing."""

import subprocess
import sys
from pathlib import Path

ONLY_PYTHON = ("torch", "timm", "lightning", "rich", "scipy", "yaml", "onnx")
_PROGRAM = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"No module named {name!r}")

REFUSED = sys.argv[1].split(",")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[2:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_refusing(
    packages: tuple[str, ...], script: Path, *arguments: str, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Runs `python script arguments` in its folder, in an interpreter in which importing the packages fails."""
    command = [sys.executable, "-c", _PROGRAM, ",".join(packages), str(script), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
