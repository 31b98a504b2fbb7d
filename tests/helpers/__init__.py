"""What tests of several rooms share.

pytest puts `tests` on the path (`pythonpath` in pyproject.toml), so a test imports `helpers` from any folder. A program
that a test starts does not have it there: its PYTHONPATH is `python_path()`.
"""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def python_path() -> str:
    """The PYTHONPATH with which a program that a test starts finds the package and these helpers."""
    return os.pathsep.join(filter(None, [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH")]))
