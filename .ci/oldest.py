"""Prints pip constraints for the oldest supported frameworks: their lower bounds in pyproject.toml as exact versions.

make oldest    (writes .ci/oldest.txt; `make test CONSTRAINTS=.ci/oldest.txt` installs them and runs the tests)
"""

import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# What the package patches, extends or calls in depth. The lower bounds of all dependencies at once have no solution: a
# runtime of the extras asks for a newer scipy, transformers for newer safetensors.
FRAMEWORKS = (
    "jsonargparse",
    "lightning",
    "timm",
    "torch",
    "torchao",
    "torchmetrics",
    "torchvision",
    "transformers",
)
HEAD = "# Lower bounds in pyproject.toml, as exact versions. Written by `make oldest`.\n"


def constraints(project: dict[str, Any]) -> str:
    """The text of the file of constraints.

    Args:
        project: The table `project` of pyproject.toml.

    Raises:
        ValueError: If a framework has no lower bound, or if two bounds of one differ.
    """
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    bounds: dict[str, set[str]] = {name: set() for name in FRAMEWORKS}
    for requirement in map(Requirement, lines):
        if requirement.name in bounds:
            bounds[requirement.name] |= {each.version for each in requirement.specifier if each.operator == ">="}
    for name, found in bounds.items():
        if len(found) != 1:
            raise ValueError(f"`{name}` must have one lower bound in pyproject.toml, got {sorted(found)}.")
    return HEAD + "".join(f"{name}=={found.pop()}\n" for name, found in bounds.items())


if __name__ == "__main__":
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    print(constraints(tomllib.loads(text)["project"]), end="")
