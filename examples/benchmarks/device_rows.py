"""The table of results by device: its columns, what may be in them, and how they are read and written."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from math import isfinite
from pathlib import Path

from lightning_prune._utils.files import atomic_write
from lightning_prune.cli.options import method_names
from lightning_prune.errors import FileFormatError
from lightning_prune.runtimes.registry import known_runtimes

ROUNDING = 1e-3  # by which speedup and dense_ms / pruned_ms may differ, as a share
SHARES = ("top1", "top5", "iou", "accuracy")  # metrics in [0, 1]
UNPRUNED = ("exact", "int8")  # methods that remove no tokens before the last block
_CLOCKS = ("wall", "cpu")
_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu", "npu", "other")
_NOT_DETERMINED = ("auto", "dense")  # names of options, not of what ran
_BREAKS = re.compile(r"[\n\r|`]")
_HOME = re.compile(r"(/home/|/Users/|[A-Za-z]:\\Users\\)\S*")


@dataclass(frozen=True)
class DeviceRow:
    """A pruned model on a device, against the dense one of the same run.

    Attributes:
        device: Product name of the processor or accelerator.
        device_type: As PyTorch names it.
        threads: On a CPU; of the host elsewhere.
        runtime: Specification of what ran both models.
        precision: Of the computation; what 8 bits are used for, `int8` says.
        clock: `wall`, or `cpu` for the CPU time of the process.
        model: Name of the model.
        weights: File of the weights, or `pretrained`.
        data: Dataset that the metric is of.
        image_size: Channels, height and width, such as `3x224x224`.
        batch: Images in a batch.
        method: What removes tokens; of several each with its blocks.
        chosen_by: `auto` where the method was searched for, else `given`.
        int8: Whether linear layers ran in 8 bits.
        removed: Tokens removed in each block, separated by spaces; empty where only the tail or 8 bits are used.
        dense_ms: Median latency of dense on a batch.
        pruned_ms: That of this model, from the same interleaved run.
        speedup: Their ratio.
        speedup_spread: Half the distance between its quartiles over the rounds.
        metric: Name of what was validated.
        metric_dense: Of dense.
        metric_change: Difference to it.
        change_low: Lower end of its 95% interval; empty where it is not known.
        change_high: Upper end.
        images: Validated.
        versions: Of packages, `name version` separated by semicolons.
        date: On which the run began, ISO 8601.
        command: That made the results.
        contributor: Who measured.
    """

    device: str
    device_type: str
    threads: int
    runtime: str
    precision: str
    clock: str
    model: str
    weights: str
    data: str
    image_size: str
    batch: int
    method: str
    chosen_by: str
    int8: bool
    removed: str
    dense_ms: float
    pruned_ms: float
    speedup: float
    speedup_spread: float | None
    metric: str
    metric_dense: float
    metric_change: float
    change_low: float | None
    change_high: float | None
    images: int
    versions: str
    date: str
    command: str
    contributor: str

    @property
    def identity(self) -> tuple[object, ...]:
        """What no two rows may share: a model, its conditions and the run."""
        named = (
            "device",
            "threads",
            "runtime",
            "precision",
            "clock",
            "model",
            "weights",
            "data",
            "image_size",
            "batch",
        )
        return tuple(
            getattr(self, name) for name in (*named, "method", "chosen_by", "int8", "removed", "date", "command")
        )

    @property
    def removed_in_all(self) -> int:
        """Tokens removed in all blocks."""
        return sum(map(int, self.removed.split()))

    @property
    def methods(self) -> list[str]:
        """The names of the methods, without settings and blocks."""
        parts = [part.strip() for part in re.sub(r":[^\s]*", "", self.method).split(",")]
        return [part.partition(" ")[0] for part in parts]


COLUMNS = tuple(field.name for field in fields(DeviceRow))


def read_rows(path: Path) -> list[DeviceRow]:
    """Reads a table and checks it.

    Args:
        path: The CSV.

    Raises:
        FileFormatError: If it does not fit the schema; names every row and column that does not.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"Cannot read {path}: {error}.") from error
    reader = csv.DictReader(io.StringIO(text), strict=True)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise FileFormatError(f"{path}: columns must be {','.join(COLUMNS)}, got {','.join(reader.fieldnames or ())}.")
    rows: list[DeviceRow] = []
    problems: list[str] = []
    for number, values in enumerate(reader, start=2):  # line 1 has the names
        if None in values or None in values.values():
            problems.append(f"row {number}: cells must be {len(COLUMNS)}, got another number.")
            continue
        row, found = _parsed(values)
        problems += [f"row {number}, {problem}" for problem in found]
        if row is not None:
            problems += [f"row {number}, {problem}" for problem in problems_of(row)]
            rows.append(row)
    problems += _duplicates(rows)
    if problems:
        raise FileFormatError("\n".join(f"{path}: {problem}" for problem in problems))
    return rows


def text_of_rows(rows: Sequence[DeviceRow]) -> str:
    """The table as CSV.

    Args:
        rows: In any order; they are sorted, so that additions of two people rarely touch the same lines.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=_order):
        writer.writerow({name: "" if value is None else value for name, value in asdict(row).items()})
    return stream.getvalue()


def write_rows(path: Path, rows: Sequence[DeviceRow]) -> None:
    """Writes a table, whole or not at all.

    Args:
        path: The CSV.
        rows: In any order.

    Raises:
        FileWriteError: If it cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(text_of_rows(rows).encode())


def problems_of(row: DeviceRow) -> Iterator[str]:
    """What is wrong with the values of a row, each as column, what was expected, and what came.

    Args:
        row: Of the right types.
    """
    for column in ("device", "precision", "model", "weights", "data", "metric", "versions", "command", "contributor"):
        value = getattr(row, column)
        if not value.strip():
            yield _problem(column, "text", value)
        elif broken := _BREAKS.search(value):
            yield _problem(column, "text that fits into a cell of Markdown", broken[0])
        elif found := _HOME.search(value):
            yield _problem(column, "text without the home folder of a user", found[0])
    for column, known in (
        ("device_type", _DEVICE_TYPES),
        ("clock", _CLOCKS),
        ("chosen_by", ("auto", "given")),
        ("runtime", tuple(known_runtimes())),
    ):
        value = getattr(row, column)
        if value.partition(":")[0] not in known:
            yield _problem(column, f"one of {', '.join(known)}", value)
    methods = [name for name in method_names() if name not in _NOT_DETERMINED]
    if unknown := [name for name in row.methods if name not in methods]:
        yield _problem("method", f"of {', '.join(methods)}", unknown[0])
    for column in ("threads", "batch", "images"):
        if getattr(row, column) < 1:
            yield _problem(column, "at least 1", getattr(row, column))
    yield from _problems_of_figures(row)
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", row.image_size):
        yield _problem("image_size", "channels x height x width, such as 3x224x224", row.image_size)
    if not re.fullmatch(r"(\d+( \d+)*)?", row.removed):
        yield _problem("removed", "whole numbers separated by spaces, one for each block", row.removed)
    elif row.removed_in_all == 0 and row.method not in UNPRUNED:
        yield _problem("removed", f"tokens of some block, unless the method is {' or '.join(UNPRUNED)}", row.removed)
    named = dict(part.strip().partition(" ")[::2] for part in row.versions.split(";"))
    if missing := [name for name in ("lightning_prune", "torch") if not named.get(name)]:
        yield _problem("versions", f"'name version; ...' with {missing[0]}", row.versions)
    if not _is_date(row.date):
        yield _problem("date", "a day, such as 2026-12-01", row.date)


def _problems_of_figures(row: DeviceRow) -> Iterator[str]:
    for column in ("dense_ms", "pruned_ms", "speedup"):
        if not 0 < getattr(row, column) < float("inf"):
            yield _problem(column, "a finite number > 0", getattr(row, column))
            return
    ratio = row.dense_ms / row.pruned_ms
    if abs(row.speedup / ratio - 1) > ROUNDING:
        yield _problem("speedup", f"dense_ms / pruned_ms = {ratio:.4f} within {100 * ROUNDING:g}%", row.speedup)
    if row.speedup_spread is not None and not 0 <= row.speedup_spread < float("inf"):
        yield _problem("speedup_spread", "a finite number >= 0", row.speedup_spread)
    if row.metric.rpartition("/")[2] in SHARES:
        for column, value in (
            ("metric_dense", row.metric_dense),
            ("metric_change", row.metric_dense + row.metric_change),
        ):
            if not -ROUNDING <= value <= 1 + ROUNDING:
                yield _problem(column, f"such that {row.metric} is a share in [0, 1]", value)
    if (row.change_low is None) != (row.change_high is None):
        yield _problem("change_low", "given with change_high or not at all", row.change_low)
    elif row.change_low is not None and row.change_high is not None:
        low, high = sorted((row.change_low, row.change_high))
        if (low, high) != (row.change_low, row.change_high) or not low <= row.metric_change <= high:
            yield _problem("metric_change", f"between change_low and change_high, {low} to {high}", row.metric_change)


def _problem(column: str, expected: str, got: object) -> str:
    return f"`{column}` must be {expected}, got {got!r}."


def _parsed(values: dict[str, str]) -> tuple[DeviceRow | None, list[str]]:
    """The row of a line of text; what is not of the type of its column."""
    known: dict[str, object] = {}
    problems: list[str] = []
    for field in fields(DeviceRow):
        text = values[field.name]
        expected, read = _READERS[str(field.type).removeprefix("<class '").removesuffix("'>")]
        try:
            known[field.name] = read(text)
        except ValueError:
            problems.append(_problem(field.name, expected, text))
    return (None if problems else DeviceRow(**known)), problems  # type: ignore[arg-type]


def _flag(text: str) -> bool:
    return {"True": True, "False": False}[text] if text in ("True", "False") else _refuse(text)


def _refuse(text: str) -> bool:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(text)
    return number


_READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "str": ("text", str),
    "int": ("a whole number", int),
    "bool": ("True or False", _flag),
    "float": ("a finite number", _finite),
    "float | None": ("a finite number, or empty", lambda text: _finite(text) if text else None),
}


def _duplicates(rows: Sequence[DeviceRow]) -> Iterator[str]:
    seen: set[tuple[object, ...]] = set()
    for row in rows:
        if row.identity in seen:
            got = f"{row.method} with `removed` {row.removed!r} of {row.date} twice"
            yield f"rows must differ in model, conditions or run, got {got}."
        seen.add(row.identity)


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _order(row: DeviceRow) -> tuple[object, ...]:
    place = (row.device, row.model, row.data, row.threads, row.runtime, row.clock, row.precision, row.batch)
    return (*place, row.date, row.command, row.chosen_by, row.int8, row.method, row.speedup, row.removed)
