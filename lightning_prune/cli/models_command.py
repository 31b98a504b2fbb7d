"""The command `models`: a table of timm's transformers and whether they can be pruned."""

import argparse
from collections.abc import Sequence
from fnmatch import fnmatch

import timm
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_prune._utils.closed_pipe import print_all
from lightning_prune.patching.models.support import (
    Group,
    SupportStatus,
    grouped,
    isotropic_names,
    support_of,
    unsupported_names,
)

_REASON_WIDTH = 24  # characters that a reason has at least
_HEAD = ("model", "names", "can be pruned", "why not, or not everywhere")


def models(args: Sequence[str]) -> int:
    """Runs the command.

    Args:
        args: Patterns of names and options; see `lightning-prune models --help`.

    Returns:
        Exit status: 0, or 2 if no name matches.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-prune models",
        description="Lists which of timm's transformers can be pruned, and why others cannot. Each model is built "
        "without weights and with one block.",
    )
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="list the names that match, such as 'vit_*dinov3*'"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table of classes as Markdown")
    options = parser.parse_args(list(args))
    names = isotropic_names()
    if options.patterns:
        names = matching([*names, *unsupported_names()], options.patterns)
    if not names:
        named = f"No transformer of timm {timm.__version__} is named {' or '.join(options.patterns)}"
        others = len(matching(timm.list_models(), options.patterns))
        print(named + (f"; {others} models of other kinds are, which cannot be pruned." if others else "."))
        return 2
    console = Console()
    hide = not console.is_terminal
    statuses = [support_of(name) for name in track(names, "Building models", disable=hide, transient=True)]
    if options.markdown:
        print_all(markdown(grouped(statuses)))
        return 0
    with console.capture() as captured:
        if options.patterns:
            console.print(names_table(statuses, console.width))
        else:
            console.print(classes_table(grouped(statuses)))
            console.print(summary(statuses))
    print_all(captured.get().removesuffix("\n"))
    return 0


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match one of the patterns, in alphabetical order."""
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def summary(statuses: Sequence[SupportStatus]) -> str:
    """The counts as a sentence."""
    fully = sum(each.reducible == "yes" for each in statuses)
    never = sum(each.reducible == "no" for each in statuses)
    partly = len(statuses) - fully - never
    return (
        f"timm {timm.__version__} has {len(statuses)} names of isotropic transformers: {fully} can be pruned, {partly} "
        f"in part or with `restore`, {never} not. `lightning-prune models 'vit_*'` lists names."
    )


def classes_table(groups: Sequence[Group]) -> Table:
    """A table with a row for each model class."""
    table = Table(box=None, pad_edge=False)
    for head in _HEAD:
        table.add_column(head, justify="right" if head == "names" else "left")
    for group in groups:
        table.add_row(group.model, str(group.names), group.reducible, group.reason)
    return table


def names_table(statuses: Sequence[SupportStatus], width: int = 80) -> Table:
    """A table with a row for each name, which is never broken: it is there to be copied. A reason is written out once.

    Args:
        statuses: What was found out.
        width: Characters in a line. Where there is no room for the class, it is left out.
    """
    columns = list(zip(("name", "model", *_HEAD[2:]), zip(*statuses, strict=True), strict=True))
    widths = [max(map(len, (head, *values))) for head, values in columns]
    reasons = _REASON_WIDTH if any(columns[-1][1]) else len(_HEAD[-1]) // 2
    has_room = sum(widths[:3]) + 3 * len("  ") + reasons <= width
    table = Table(box=None, pad_edge=False)
    shown = [0, 1, 2, 3] if has_room else [0, 2, 3]
    for place in shown:
        table.add_column(columns[place][0], no_wrap=place < 3)
    above = ""
    for each in statuses:
        reason = "as above" if each.reason and each.reason == above else each.reason
        above = each.reason
        table.add_row(*(each._replace(reason=reason)[place] for place in shown))
    return table


def markdown(groups: Sequence[Group]) -> str:
    """The table of classes for a README."""
    rows = [_HEAD, ("---", "---:", "---", "---")]
    rows += [(f"`{group.model}`", str(group.names), group.reducible, group.reason) for group in groups]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
