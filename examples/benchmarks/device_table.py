"""The table of results by device, `examples/results/devices.csv`, that everybody can add to.

    lightning-prune compare --config configs/digits.yaml --output results/digits
    python examples/benchmarks/device_table.py add results/digits --contributor YOUR_NAME
    python examples/benchmarks/device_table.py check
    python examples/benchmarks/device_table.py render

`add` takes the figures from `results.json` as `compare` wrote them. `check` says which row and column does not fit.
`render` writes `docs/devices.md`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from device_page import page
from device_rows import UNPRUNED, DeviceRow, problems_of, read_rows, write_rows

import lightning_prune as lp
from lightning_prune._utils.files import atomic_write
from lightning_prune._utils.private_paths import without_names
from lightning_prune.comparison import read_results
from lightning_prune.report.rows import Row

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "examples" / "results" / "devices.csv"
PAGE = ROOT / "docs" / "devices.md"
_RUNTIME_PACKAGES = ("onnxruntime", "openvino", "executorch", "nncf")


def rows_of(document: Mapping[str, Any], contributor: str, given: Mapping[str, str | None]) -> list[DeviceRow]:
    """The rows of a comparison that pruned something, or ran in 8 bits, and were validated.

    Args:
        document: As `results.json` holds it.
        contributor: Who measured.
        given: What the document does not say: `model`, `weights` and `data`, or None.

    Raises:
        ArgumentError: If the document lacks something that every row needs, and it is not given.
    """
    context = document["context"]
    shared = {
        **{name: given.get(name) or _recorded(document, name) for name in ("model", "weights", "data")},
        "device": context.get("device", ""),
        "device_type": context.get("device_type", ""),
        "threads": int(context["threads"]),
        "clock": context.get("clock", "wall"),
        "image_size": "x".join(map(str, context["image_shape"])),
        "versions": _versions(document),
        "date": str(document["started"])[:10],
        "command": str(document["command"]),
        "contributor": contributor,
    }
    for name in ("model", "weights", "data"):
        if not shared[name]:
            raise lp.ArgumentError(f"`--{name}` must be given for a run that does not record it, got nothing.")
    shared = without_names(shared)
    rows = [Row.from_dict(each) for each in document["rows"]]
    dense = {row.runtime: row for row in reversed(rows) if not row.method}
    made: dict[tuple[object, ...], DeviceRow] = {}
    for row in rows:
        found = _row(row, dense.get(row.runtime), document["variants"].get(row.variant, {}), shared)
        if found is not None:
            made.setdefault(found.identity, found)
    return list(made.values())


def add(path: Path, folder: Path, contributor: str, given: Mapping[str, str | None]) -> int:
    """Adds the rows of a folder of results that the table does not have; returns how many.

    Args:
        path: The table; made if it does not exist.
        folder: That `compare` wrote.
        contributor: See `rows_of`.
        given: See `rows_of`.

    Raises:
        ArgumentError: As `rows_of`, or if a row does not fit the schema.
        FileFormatError: If the results or the table cannot be read.
    """
    rows = read_rows(path) if path.exists() else []
    known = {row.identity for row in rows}
    found = rows_of(read_results(folder / "results.json"), contributor, given)
    new = [row for row in found if row.identity not in known]
    for row in new:
        for problem in problems_of(row):
            raise lp.ArgumentError(f"{folder}, {row.method}: {problem}")
    write_rows(path, [*rows, *new])
    return len(new)


def _row(row: Row, dense: Row | None, variant: Mapping[str, Any], shared: Mapping[str, Any]) -> DeviceRow | None:
    """The row of a variant; None for dense, for plans that remove nothing, and where a figure is missing."""
    schedule = variant.get("schedule") or {}
    removed = [int(count) for count in schedule.get("removed", ())]
    if not row.method or dense is None or (not any(removed) and row.method not in UNPRUNED):
        return None
    logged = row.top1 is None
    metric = (row.metric, row.metric_change, row.metric_low, row.metric_high)
    if not logged:
        metric = (row.top1, row.top1_change, row.top1_low, row.top1_high)
    value, change, low, high = metric
    figures = (dense.latency_ms, row.latency_ms, row.speedup, value, change, row.images, row.batch_size)
    if any(figure is None for figure in figures):
        return None
    base = dense.metric if logged else dense.top1
    return DeviceRow(
        **shared,
        runtime=row.runtime,
        precision=row.precision,
        batch=int(row.batch_size or 0),
        method=_method(row, schedule),
        chosen_by="auto" if row.method == "auto" else "given",
        int8=row.int8,
        removed=" ".join(map(str, removed)) if any(removed) else "",
        dense_ms=_rounded(dense.latency_ms),
        pruned_ms=_rounded(row.latency_ms),
        speedup=_rounded(row.speedup),
        speedup_spread=None if row.speedup_spread is None else _rounded(row.speedup_spread),
        metric=row.metric_name if logged else "top1",
        metric_dense=_rounded(base),
        metric_change=_rounded(change),
        change_low=None if low is None or high is None else _rounded(low),
        change_high=None if low is None or high is None else _rounded(high),
        images=int(row.images or 0),
    )


def _method(row: Row, schedule: Mapping[str, Any]) -> str:
    """What removes the tokens: of `auto` what it chose."""
    if not schedule or row.method in UNPRUNED:
        return row.method
    if row.method != "auto" or not schedule.get("method"):
        return row.method
    return lp.Schedule.from_dict(schedule).method_label


def _rounded(value: float | None) -> float:
    """Six significant digits."""
    assert value is not None
    return float(f"{value:.6g}")


def _recorded(document: Mapping[str, Any], name: str) -> str:
    """The model, the weights or the data of a command line, without folders of the user; empty if it had none."""
    line = document.get("config", {}).get("command_line") or {}
    model, data = line.get("model") or {}, line.get("data") or {}
    if name == "model":
        named = model.get("model") or ""
        return str(named.get("class_path", "") if isinstance(named, Mapping) else named)
    if name == "weights":
        return PurePath(model["weights"]).name if model.get("weights") else "pretrained" * bool(model.get("pretrained"))
    if not data:
        return ""
    arguments = data.get("init_args") or {}
    root, split = arguments.get("root"), arguments.get("split")
    words = [str(data.get("class_path", "")).rpartition(".")[2], PurePath(root).name if root else "", split or ""]
    return " ".join(word for word in words if word)


def _versions(document: Mapping[str, Any]) -> str:
    context = document["context"]
    known = {**document.get("versions", {}), **{key: context[key] for key in ("torch", "timm") if key in context}}
    known |= {key: context[key] for key in _RUNTIME_PACKAGES if key in context}
    wanted = ("lightning_prune", "torch", "timm", *_RUNTIME_PACKAGES)
    return "; ".join(f"{name} {known[name]}" for name in wanted if known.get(name))


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, default=TABLE)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="append the rows of folders that `compare` wrote")
    adding.add_argument("folders", type=Path, nargs="+", metavar="RESULTS_FOLDER")
    adding.add_argument("--contributor", required=True, help="your name, or that of your account")
    for name in ("model", "weights", "data"):
        adding.add_argument(f"--{name}", help="where results.json does not record it, as of compare() in Python")
    commands.add_parser("check", help="say which row and column does not fit")
    rendering = commands.add_parser("render", help="write docs/devices.md")
    rendering.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(args)
    try:
        if options.command == "add":
            given = {name: getattr(options, name) for name in ("model", "weights", "data")}
            for folder in options.folders:
                count = add(options.table, folder, options.contributor, given)
                print(f"{folder}: {count} rows added to {options.table}")
            return 0
        rows = read_rows(options.table)
        if options.command == "render":
            with atomic_write(options.page) as temporary:
                temporary.write_bytes(page(rows).encode())
        print(f"{options.table}: {len(rows)} rows, as they must be")
    except lp.PruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
