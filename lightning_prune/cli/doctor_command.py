"""The command `doctor`: the machine, the installation and the noise, as tables or as JSON."""

import argparse
import contextlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_prune._utils.closed_pipe import print_all
from lightning_prune._utils.machine_description import Report, describe_machine
from lightning_prune._utils.private_paths import without_names
from lightning_prune._utils.readings import NotReadable, attempt

_NAMES = 24  # columns of the names, so that sections are aligned
_VERBATIM = ("variables", "versions", "runtimes")  # sections whose names are those of others
_UNITS = {"_gib": "GiB", "_mib": "MiB", "_percent": "%", "_us": "us", "_watts": "W", "_mhz": "MHz", "_celsius": "C"}


def doctor(args: Sequence[str]) -> int:
    """Runs the command.

    Args:
        args: Options; see `lightning-prune doctor --help`.

    Returns:
        Exit status: 0, whatever is found.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-prune doctor",
        description="Describes the machine, what is installed, which runtimes work, and how noisy the machine is now: "
        "what to add to an issue. The home folder is ~, and neither users nor the machine are named.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; what could not be read is {not_readable: why}")
    parser.add_argument("--no-timing", action="store_true", help="do not measure the noise, which takes ten seconds")
    options = parser.parse_args([word.replace("_", "-") for word in args])
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # of libraries that are imported
        warnings.simplefilter("ignore")
        report = _report(timing=not options.no_timing)
    if options.json:
        print_all(json.dumps(plain(report), indent=2))
        return 0
    console = Console(markup=False, highlight=False)
    with console.capture() as captured:
        for title, entries in report.items():
            console.print(title, style="bold")
            console.print(Padding(section_table(entries, title in _VERBATIM), (0, 0, 0, 2)))
    print_all("\n".join(line.rstrip() for line in captured.get().splitlines()))
    return 0


def plain(value: Any) -> Any:
    """A report as JSON has it: a value that could not be read is `{"not_readable": reason}`.

    Args:
        value: A report, or a part of one.

    Example:
        >>> from lightning_prune._utils.readings import NotReadable
        >>> from lightning_prune.cli.doctor_command import plain
        >>> plain({"turbo": NotReadable("no such file"), "threads": 2})
        {'turbo': {'not_readable': 'no such file'}, 'threads': 2}
    """
    if isinstance(value, NotReadable):
        return {"not_readable": value.reason}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def section_table(entries: Mapping[str, Any], verbatim: bool = False) -> Table:
    """A section as a table of names and values; long values take several lines, also where output is piped.

    Args:
        entries: Name -> value.
        verbatim: Whether names are shown as they are, and not as words.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(min_width=_NAMES, max_width=_NAMES)
    table.add_column(overflow="fold")
    for name, value in entries.items():
        label, text = (name, as_text(value)) if verbatim else labelled(name, value)
        table.add_row(Text(label), Text(text))
    return table


def labelled(name: str, value: Any) -> tuple[str, str]:
    """The name and the value of an entry as text, with its unit after a number and not in its name.

    Args:
        name: Of the entry.
        value: Of the entry.

    Example:
        >>> from lightning_prune.cli.doctor_command import labelled
        >>> labelled("total_gib", 15.5), labelled("usable_cores", 4)
        (('total', '15.5 GiB'), ('usable cores', '4'))
    """
    unit = next((unit for unit in _UNITS if name.endswith(unit)), None)
    if unit is None or isinstance(value, bool) or not isinstance(value, int | float):
        return name.replace("_", " "), as_text(value)
    return name.removesuffix(unit).replace("_", " "), f"{as_text(value)} {_UNITS[unit]}"


def as_text(value: Any) -> str:
    """A value of a report in a table; of a measurement of noise, the verdict.

    Args:
        value: A plain value, or a `NotReadable`.

    Example:
        >>> from lightning_prune.cli.doctor_command import as_text
        >>> as_text({"busy_percent": 12.5, "throttled": False}), as_text([0.5, 1.0])
        ('busy 12.5 %, throttled no', '0.5, 1')
        >>> as_text({"cuda:0": "NVIDIA H200"})
        'cuda:0 = NVIDIA H200'
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Mapping) and "verdict" in value:
        return f"{as_text(value['ms'])} ms. {value['verdict']}"
    if isinstance(value, Mapping):
        return ", ".join(_part(str(key), each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(as_text, value)) if any(isinstance(each, Mapping) for each in value) else _listed(value)
    return str(value)


def _part(name: str, value: Any) -> str:
    """An entry inside of another, on one line."""
    return (" = " if isinstance(value, str) else " ").join(labelled(name, value))


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(as_text, values)) or "none"


def _report(timing: bool) -> Report:
    """The whole report; without what needs torch where torch or a library of models cannot be imported."""

    def whole() -> Report:
        from lightning_prune.profiling.installation_report import machine_report

        return machine_report(timing)

    found = attempt(whole)
    if isinstance(found, NotReadable):
        cleaned: Report = without_names({**describe_machine(), "torch": {"all": found}})
        return cleaned
    report: Report = found
    return report
