"""Measures the latency profile of this folder on this device, without torch: python profile.py --help."""

import sys
from pathlib import Path


def launch(folder: Path) -> int:
    """Runs the measuring files of the folder instead of those of an installed package.

    Args:
        folder: The bundle.

    Returns:
        Exit status.
    """
    if sys.version_info < (3, 11):  # noqa: UP036  it runs where nothing was installed
        print("error: Python must be 3.11 or newer, got " + sys.version.split()[0], file=sys.stderr)
        return 2
    # This file is called as a module of Python is, which libraries import: its folder must not be searched.
    sys.path[:] = [str(folder / "measuring")] + [each for each in sys.path if Path(each or ".").resolve() != folder]
    from lightning_prune.exporting.bundle_profile import main

    return main(folder)


if __name__ == "__main__":
    sys.exit(launch(Path(__file__).resolve().parent))
