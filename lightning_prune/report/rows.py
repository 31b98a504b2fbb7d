"""The rows of a comparison: their columns, which of them belong together, and which figure ranks them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, NamedTuple

from lightning_prune.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of a comparison. The attributes are the columns of `results.csv`; what is not known is None.

    Attributes:
        variant: Its name; `dense` is the unpruned model.
        method: The reduction; empty for dense, `int8` where nothing is pruned.
        top1: Share of images whose best class is right, in [0, 1]; None where the module does not log it.
        top1_change: Difference to dense in the share of right images, on the same images.
        speedup: Dense latency over the latency of this variant, the median over rounds in which both ran.
        latency_ms: Median time of the transformer on one batch, from one interleaved run of all variants.
        latency_p90_ms: 90th percentile of these times.
        runtime: What executed the model, such as `torch` or `torch.compile:mode=blocks`.
        precision: Of the computation.
        int8: Whether its linear layers ran in 8 bits.
        target_speedup: The speed-up that its schedule was planned for.
        block: The reducing blocks; empty for dense.
        removed: R, tokens removed in all.
        tokens: Tokens that leave the last reducing block.
        top1_low: Lower end of the 95% interval of `top1_change`.
        top1_high: Upper end.
        top5: Share of images with the right class among the best five.
        agreement: Share of images with the same best class as dense.
        latency_spread: Half the distance between the quartiles of the latencies.
        speedup_spread: Half the distance between the quartiles of the speed-up.
        throughput: Images a second in forward during validation.
        throughput_end_to_end: Images a second of the whole loop, loading included; dense, which comes first, pays for
            cold file caches.
        joules_per_image: Energy of an image; None where the device has no counter.
        watts: Mean power meanwhile.
        images: Images validated.
        device: What it ran on.
        batch_size: Images in a batch.
        note: A remark, such as why the row has no figures.

    Example:
        >>> from lightning_prune.report.rows import Row
        >>> Row.from_dict({"variant": "pomt 1.5x", "method": "pomt", "top1": float("nan"), "unknown": 1}).top1
    """

    variant: str = ""
    method: str = ""
    top1: float | None = None
    top1_change: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None
    latency_p90_ms: float | None = None
    runtime: str = ""
    precision: str = ""
    int8: bool = False
    target_speedup: float | None = None
    block: str = ""
    removed: int | None = None
    tokens: int | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    top5: float | None = None
    agreement: float | None = None
    latency_spread: float | None = None
    speedup_spread: float | None = None
    throughput: float | None = None
    throughput_end_to_end: float | None = None
    joules_per_image: float | None = None
    watts: float | None = None
    images: int | None = None
    device: str = ""
    batch_size: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, in the order of the columns."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """The row that `to_dict` described; a figure that is missing, not finite or of another type is None."""
        known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(cls)}
        text = {name: "" if known[name] is None else str(known[name]) for name in _TEXT}
        figures: dict[str, Any] = {name: number(value) for name, value in known.items()}
        return cls(**{**figures, **text, "int8": known["int8"] is True})


_TEXT = ("variant", "method", "runtime", "precision", "block", "device", "note")


class Score(NamedTuple):
    """The figure that ranks the rows.

    Attributes:
        key: Its column.
        label: What people call it.
    """

    key: str
    label: str

    def of(self, row: Row) -> float | None:
        """The figure of a row, None where it is not known."""
        return number(getattr(row, self.key))


TOP1 = Score("top1", "top-1")
AGREEMENT = Score("agreement", "agreement with dense")


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """The rows of a document that `compare` wrote.

    Raises:
        DataError: If it has none.
    """
    rows = document.get("rows")
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(f"`document` must hold the rows of a comparison under 'rows', got {rows!r}.")
    return [Row.from_dict(row) for row in rows]


def series_name(row: Row) -> str:
    """The line of a plot that the row is on: a method, `int8`, or both; empty for dense.

    Example:
        >>> series_name(Row(variant="pomt+int8", method="pomt", int8=True)), series_name(Row(variant="dense"))
        ('pomt+int8', '')
    """
    method = row.method.removesuffix("+int8")
    parts = [] if method in ("", "dense", "int8") else [method]
    return "+".join([*parts, "int8"] if row.int8 or method == "int8" else parts)


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Line -> its rows, in the order in which they came; without dense."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if name := series_name(row):
            found.setdefault(name, []).append(row)
    return found


def dense_of(rows: Sequence[Row]) -> Row | None:
    """The row of the unpruned model, if there is one."""
    return next((row for row in rows if not series_name(row)), None)


def score_of(rows: Sequence[Row]) -> Score | None:
    """Top-1 where any row knows it, else the agreement with dense where any row knows that, else None."""
    return next((score for score in (TOP1, AGREEMENT) if any(score.of(row) is not None for row in rows)), None)


def by_target(rows: Sequence[Row], score: Score | None) -> dict[float | None, list[Row]]:
    """Target speed-up -> its rows, best first; the rows without a target come first, as they came."""
    targets = sorted({row.target_speedup for row in rows if row.target_speedup is not None})
    groups: dict[float | None, list[Row]] = {None: [row for row in rows if row.target_speedup is None]}
    for target in targets:
        groups[target] = ranked([row for row in rows if row.target_speedup == target], score)
    return {target: group for target, group in groups.items() if group}


def number(value: Any) -> float | None:
    """The figure, or None where it is none, or not finite."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return value if real else None


def ranked(rows: Sequence[Row], score: Score | None) -> list[Row]:
    """Best first; rows without the figure last, in the order in which they came."""
    if score is None:
        return list(rows)
    return sorted(rows, key=lambda row: _or_last(score.of(row)), reverse=True)


def placed(row: Row, score: Score) -> bool:
    """Whether the row has both a latency and the figure, so that it has a place in a plot."""
    return number(row.latency_ms) is not None and score.of(row) is not None


def front_of(rows: Sequence[Row], score: Score) -> list[Row]:
    """The rows that no other is at least as good as in both latency and the figure, fastest first.

    Example:
        >>> rows = [Row(latency_ms=ms, top1=share) for ms, share in ((9, 0.9), (5, 0.8), (7, 0.7), (6, 0.85))]
        >>> [row.latency_ms for row in front_of(rows, TOP1)]
        [5, 6, 9]
    """
    front: list[Row] = []
    best = float("-inf")
    known = [(row.latency_ms or 0.0, score.of(row) or 0.0, row) for row in rows if placed(row, score)]
    for _, figure, row in sorted(known, key=lambda entry: (entry[0], -entry[1])):
        if figure > best:
            front.append(row)
            best = figure
    return front


def change_of(row: Row, dense: Row | None) -> float | None:
    """The change in top-1 against dense: as measured on the same images, else the difference of the two figures."""
    if row.top1_change is not None or row.top1 is None or dense is None or dense.top1 is None:
        return row.top1_change
    return row.top1 - dense.top1


def interval_of(row: Row) -> tuple[float, float] | None:
    """The 95% interval of the change, if it is known."""
    return None if row.top1_low is None or row.top1_high is None else (row.top1_low, row.top1_high)


def missed(row: Row) -> bool:
    """Whether the latency is above the row's target by more than the spread of the speed-up, and than 0.5% of dense."""
    target, speedup = row.target_speedup, row.speedup
    if target is None or speedup is None or not speedup > 0:
        return False
    near = 1 / speedup <= 1 / target + 0.005  # which the planning counts as reached
    return not near and speedup + (row.speedup_spread or 0.0) < target


def _or_last(figure: float | None) -> float:
    return -1.0 if figure is None else figure
