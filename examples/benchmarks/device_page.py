"""The page of results by device, `docs/devices.md`, made of the table."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from device_rows import SHARES, DeviceRow

from lightning_prune._utils.formatting import milliseconds, points

_HEAD = """\
# Results by device

This page is made of [examples/results/devices.csv](https://github.com/lightning-prune/lightning-prune/blob/main/examples/results/devices.csv)
by `python examples/benchmarks/device_table.py render`; do not edit it by hand. A row is a pruned model against the
dense one, timed in one interleaved run. Compare milliseconds only within one run. Below each table are its runs: date,
who measured, versions and command.

- **speed-up**: dense over pruned in the same runtime and precision, ± half the distance between its quartiles over the
  rounds.
- **change**: of the metric against dense on the same images, with its 95% interval where it is known; in percentage
  points where the metric is a share.
- **removed**: tokens in all blocks; the file has them block by block. `exact` and `int8` remove none before the last
  block.
- **auto**: the method and the counts were chosen by the plan. Otherwise the method was given, and the counts were
  planned.
- `random` and `resize` are controls: other methods should lose less than they do.

## Adding a device

Results of other devices are welcome, of slow and unusual ones too. Run nothing else meanwhile; `lightning-prune doctor`
says how noisy the machine is.

```bash
lightning-prune compare --config configs/digits.yaml --methods auto pomt tome topk random resize \\
    --speedups 1.25 1.5 --prune.use_cache false --output results/digits
```

```bash
python examples/benchmarks/device_table.py add results/digits --contributor YOUR_NAME
python examples/benchmarks/device_table.py check
python examples/benchmarks/device_table.py render
```

Then open a pull request with `examples/results/devices.csv` and `docs/devices.md`. Any model and dataset will do; the
embedded digits model needs no download. `add` takes the figures from `results.json`, as `compare` wrote them; never
type them. It writes `~` for the home folder in a command. `check` names the row and the column that does not fit. A
test compares this page with the table, so run `render` after every change.
"""


def page(rows: Sequence[DeviceRow]) -> str:
    """The whole page.

    Args:
        rows: Of the table.
    """
    devices = sorted({row.device for row in rows})
    lines = [_HEAD, "## Devices", ""]
    for device in devices:
        own = [row for row in rows if row.device == device]
        models = ", ".join(f"`{model}`" for model in sorted({row.model for row in own}))
        lines.append(f"- {device}: {len(own)} rows; {models}")
    for device in devices:
        lines += ["", f"## {device}"]
        own = sorted((row for row in rows if row.device == device), key=_section)
        for _, group in groupby(own, key=_section):
            lines += ["", *_table(list(group))]
    return "\n".join(lines) + "\n"


def _section(row: DeviceRow) -> tuple[object, ...]:
    place = (row.model, row.weights, row.data, row.image_size, row.metric, row.images)
    return (*place, row.threads, row.runtime, row.precision, row.clock, row.batch)


def _table(rows: Sequence[DeviceRow]) -> Iterator[str]:
    """A table of rows that differ in method, schedule and run only, and the runs below it."""
    first = rows[0]
    threads = f"{first.threads} thread{'s' * (first.threads != 1)}, " if first.device_type == "cpu" else ""
    clock = ", CPU time" if first.clock == "cpu" else ""
    yield f"### {first.model}, {first.runtime}, batch {first.batch}: {first.data}"
    yield ""
    yield (
        f"{threads}{first.precision}{clock}; weights {first.weights}; images {first.image_size}; {first.metric} on "
        f"{first.images} images."
    )
    yield ""
    runs = sorted({_run(row) for row in rows})
    yield f"| method | removed | speed-up | {first.metric} of dense | change | dense ms | pruned ms | run |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for row in sorted(rows, key=lambda each: (runs.index(_run(each)), -each.speedup, each.method, each.removed)):
        yield _line(row, runs.index(_run(row)) + 1)
    yield ""
    for number, (day, contributor, versions, command) in enumerate(runs, start=1):
        yield f"{number}. {day}, {contributor}; {versions}: `{command}`"


def _run(row: DeviceRow) -> tuple[str, str, str, str]:
    return row.date, row.contributor, row.versions, row.command


def _line(row: DeviceRow, run: int) -> str:
    method = f"{row.method}{' + int8' if row.int8 and row.method != 'int8' else ''}"
    spread = "" if row.speedup_spread is None else f" ± {row.speedup_spread:.2f}"
    share = row.metric.rpartition("/")[2] in SHARES
    dense = f"{100 * row.metric_dense:.2f}%" if share else f"{row.metric_dense:.4g}"
    cells = (
        f"auto: {method}" if row.chosen_by == "auto" else method,
        str(row.removed_in_all),
        f"{row.speedup:.2f}x{spread}",
        dense,
        _change(row, share),
        milliseconds(row.dense_ms),
        milliseconds(row.pruned_ms),
        str(run),
    )
    return f"| {' | '.join(cells)} |"


def _change(row: DeviceRow, share: bool) -> str:
    def shown(value: float) -> str:
        return points(value) if share else f"{value:+.4g}"

    interval = ""
    if row.change_low is not None and row.change_high is not None:
        interval = f" ({shown(row.change_low)} to {shown(row.change_high)})"
    return f"{shown(row.metric_change)}{interval}"
