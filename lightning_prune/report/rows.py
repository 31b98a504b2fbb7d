"""What the rows of a comparison's document say: which belong together, and which figure ranks them."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from lightning_prune.errors import DataError

Row = Mapping[str, Any]


class Score(NamedTuple):
    """The figure that ranks the rows.

    Attributes:
        key: Its column.
        label: What people call it.
    """

    key: str
    label: str


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
    return list(rows)


def series_name(row: Row) -> str:
    """The line of a plot that the row is on: a method, `int8`, or both; empty for dense.

    Example:
        >>> series_name({"method": "pomt", "int8": True}), series_name({"method": "", "variant": "dense"})
        ('pomt+int8', '')
    """
    method = str(row.get("method") or "").removesuffix("+int8")
    parts = [] if method in ("", "dense", "int8") else [method]
    return "+".join([*parts, "int8"] if row.get("int8") or method == "int8" else parts)


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
    for score in (TOP1, AGREEMENT):
        if any(number(row, score.key) is not None for row in rows):
            return score
    return None


def by_target(rows: Sequence[Row], score: Score | None) -> dict[float | None, list[Row]]:
    """Target speed-up -> its rows, best first; the rows without a target come first, as they came."""
    targets = sorted({target for row in rows if (target := number(row, "target")) is not None})
    groups: dict[float | None, list[Row]] = {None: [row for row in rows if number(row, "target") is None]}
    for target in targets:
        groups[target] = ranked([row for row in rows if number(row, "target") == target], score)
    return {target: group for target, group in groups.items() if group}


def number(row: Row, key: str) -> float | None:
    """The figure, or None where the row has none, or one that is not finite."""
    value = row.get(key)
    real = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return float(value) if real and value is not None else None


def ranked(rows: Sequence[Row], score: Score | None) -> list[Row]:
    """Best first; rows without the figure last, in the order in which they came."""
    if score is None:
        return list(rows)
    return sorted(rows, key=lambda row: _or_last(number(row, score.key)), reverse=True)


def placed(row: Row, score: Score) -> bool:
    """Whether the row has both a latency and the figure, so that it has a place in a plot."""
    return number(row, "latency_ms") is not None and number(row, score.key) is not None


def front_of(rows: Sequence[Row], score: Score) -> list[Row]:
    """The rows that no other is at least as good as in both latency and the figure, fastest first.

    Example:
        >>> rows = [{"latency_ms": ms, "top1": share} for ms, share in ((9, 0.9), (5, 0.8), (7, 0.7), (6, 0.85))]
        >>> [row["latency_ms"] for row in front_of(rows, TOP1)]
        [5, 6, 9]
    """
    front: list[Row] = []
    known = [row for row in rows if placed(row, score)]
    for row in sorted(known, key=lambda row: (row["latency_ms"], -row[score.key])):
        if not front or row[score.key] > front[-1][score.key]:
            front.append(row)
    return front


def percent(share: float | None) -> str:
    """A share as a percentage with two digits, or a dash."""
    return "-" if share is None else f"{100 * share:.2f}%"


def points(share: float) -> str:
    """A difference of shares in percentage points, signed, with a minus as wide as the plus."""
    return f"{100 * share:+.2f}".replace("-", "\u2212")


def change_of(row: Row, dense: Row | None) -> float | None:
    """The change in top-1 against dense: as measured on the same images, else the difference of the two figures."""
    change = number(row, "top1_change")
    share, before = number(row, "top1"), None if dense is None else number(dense, "top1")
    return share - before if change is None and share is not None and before is not None else change


def interval_of(row: Row) -> tuple[float, float] | None:
    """The 95% interval of the change, if it is known."""
    low, high = number(row, "top1_low"), number(row, "top1_high")
    return None if low is None or high is None else (low, high)


def missed(row: Row) -> bool:
    """Whether the latency is above the row's target by more than the spread of the speed-up, and than 0.5% of dense."""
    target, speedup = number(row, "target"), number(row, "speedup")
    if target is None or speedup is None or not speedup > 0:
        return False
    near = 1 / speedup <= 1 / target + 0.005  # which the planning counts as reached
    return not near and speedup + (number(row, "speedup_spread") or 0.0) < target


def _or_last(figure: float | None) -> float:
    return -1.0 if figure is None else figure
