"""Checks that the files of the repository agree with the tag of a release, and prints the notes of a version.

python .ci/release.py check v1.2.3    (exit status 1 and a line for each problem)
python .ci/release.py notes v1.2.3
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(changelog: str, version: str) -> tuple[str, str]:
    """The section of a version in the changelog.

    Args:
        changelog: Text of CHANGELOG.md.
        version: Such as `1.2.3`.

    Returns:
        The date in the heading of the section, and the text below it; both empty where there is no such section.
    """
    heading = rf"^## \[{re.escape(version)}\] - (\S+)\n(.*?)(?=^## \[|\Z)"
    found = re.search(heading, changelog, re.MULTILINE | re.DOTALL)
    return (found[1], found[2].strip()) if found else ("", "")


def problems(tag: str, package: str, changelog: str, citation: str) -> list[str]:
    """What has to be put right before the tag can be released.

    Args:
        tag: Such as `v1.2.3`.
        package: Text of lightning_prune/__init__.py.
        changelog: Text of CHANGELOG.md.
        citation: Text of CITATION.cff.

    Returns:
        A line for each problem.
    """
    version = tag.removeprefix("v")
    date, text = notes(changelog, version)
    expected = {
        "the tag": (f"v{version}", tag),
        "`__version__` in lightning_prune/__init__.py": (version, _value(package, "__version__ = ")),
        "`version` in CITATION.cff": (version, _value(citation, "version: ")),
        "`date-released` in CITATION.cff": (date, _value(citation, "date-released: ")),
    }
    found = [f"{what} must be {wanted!r}, got {came!r}." for what, (wanted, came) in expected.items() if wanted != came]
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        found.append(f"CHANGELOG.md must have a heading `## [{version}] - YYYY-MM-DD`, got the date {date!r}.")
    if not text:
        found.append(f"CHANGELOG.md must say what is new in {version}, got nothing.")
    return found


def _value(text: str, start: str) -> str:
    """The rest of the line with that start, without quotes; empty where there is none."""
    return next((line.removeprefix(start).strip("\"'") for line in text.splitlines() if line.startswith(start)), "")


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "notes"))
    parser.add_argument("tag", help="such as v1.2.3")
    options = parser.parse_args()
    names = ("lightning_prune/__init__.py", "CHANGELOG.md", "CITATION.cff")
    package, changelog, citation = ((ROOT / name).read_text(encoding="utf-8") for name in names)
    if options.action == "notes":
        print(notes(changelog, options.tag.removeprefix("v"))[1])
        return 0
    found = problems(options.tag, package, changelog, citation)
    if not found:
        print(f"{options.tag}: package, changelog and citation agree")
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
