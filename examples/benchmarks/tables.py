"""Tables of benchmarks, with the context of the measurement."""

import csv
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

import lightning_prune as lp
from lightning_prune._utils.device import device_name

Row = dict[str, Any]


def context_of(device: str) -> dict[str, str]:
    """Device, threads, versions, date and command, on which every figure depends."""
    return {
        "device": device_name(torch.device(device)),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "lightning_prune": lp.__version__,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def write_table(path: Path, rows: Sequence[Row], context: dict[str, str]) -> None:
    """Writes a CSV under lines of `# name: value`; `pandas.read_csv(path, comment="#")` and `read_table` read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        for name, value in context.items():
            stream.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table, as text."""
    with path.open() as stream:
        return list(csv.DictReader(line for line in stream if not line.startswith("#")))


def print_table(title: str, rows: Sequence[Row], *columns: str) -> None:
    """Prints some columns of a table, or all."""
    table = Table(title=title, title_justify="left")
    for name in columns or rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns or row))
    Console().print(table)
