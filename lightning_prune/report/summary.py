"""The main facts of a comparison: the best variants of each target, and variants that gain nothing."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_prune.report.rows import (
    Row,
    Score,
    by_target,
    dense_of,
    interval_of,
    missed,
    number,
    rows_of,
    runtime_suffix,
    score_of,
)


class TargetSummary(NamedTuple):
    """The best variants of one target speed-up.

    Attributes:
        speedup: The target.
        best: The variants that reach the target with the highest score; several if they are equal.
        overlapping: Other variants whose 95% interval overlaps with that of the best.
        runtime: The runtime that they are of; empty where there is one runtime only.
    """

    speedup: float
    best: tuple[Row, ...]
    overlapping: tuple[Row, ...]
    runtime: str = ""


class UnreachedTarget(NamedTuple):
    """A target that no schedule of a method reaches.

    Attributes:
        method: The method.
        target: The speed-up that was asked for.
        best: The highest speed-up that it reaches; None if unknown.
        reason: Why it reaches no more; empty if unknown.
    """

    method: str
    target: float | None
    best: float | None
    reason: str


class Summary(NamedTuple):
    """The main facts of a comparison.

    Attributes:
        score: What ranks the variants; None if no accuracy is known.
        targets: One entry for each target with a score, in each runtime.
        not_faster: Variants whose speed-up is not above 1 by more than its spread.
        below_random: Pairs of a variant and the `random` variant of the same target, which has the higher score.
        missed: Variants that are slower than their target in the final timing.
        unreached: Targets that a method cannot reach.
    """

    score: Score | None
    targets: tuple[TargetSummary, ...]
    not_faster: tuple[Row, ...]
    below_random: tuple[tuple[Row, Row], ...]
    missed: tuple[Row, ...]
    unreached: tuple[UnreachedTarget, ...]


def _target(speedup: float, group: Sequence[Row], score: Score) -> TargetSummary | None:
    known = [row for row in group if score.of(row) is not None]
    if not known:
        return None
    best = tuple(row for row in known if score.of(row) == score.of(known[0]))
    interval = interval_of(best[0])
    others = [(row, other) for row in known if row not in best and (other := interval_of(row)) is not None]
    close = () if interval is None else tuple(row for row, other in others if other[1] >= interval[0])
    return TargetSummary(speedup, best, close, known[0].runtime if runtime_suffix(known[0]) else "")


def _below_random(group: Sequence[Row], score: Score) -> list[tuple[Row, Row]]:
    floor = next((row for row in group if row.method == "random" and not row.int8), None)
    least = None if floor is None else score.rank(floor)
    if floor is None or least is None:
        return []
    others = [row for row in group if row.method.removesuffix("+int8") != "random"]
    return [(row, floor) for row in others if (figure := score.rank(row)) is not None and figure < least]


def _in_each_runtime(group: Sequence[Row]) -> list[list[Row]]:
    runtimes = dict.fromkeys(runtime_suffix(row) for row in group)
    return [[row for row in group if runtime_suffix(row) == runtime] for runtime in runtimes]


def _unreached(entry: Mapping[str, Any]) -> UnreachedTarget:
    target, best = number(entry.get("target_speedup")), number(entry.get("best"))
    return UnreachedTarget(str(entry.get("method") or ""), target, best, str(entry.get("reason") or ""))


def summarise(document: Mapping[str, Any]) -> Summary:
    """Finds the best variants of each target and the variants that lose against dense, `random` or their target.

    Args:
        document: What `compare` writes as `results.json`.

    Raises:
        DataError: If the document has no rows.

    Example:
        >>> dense = {"variant": "dense", "method": "", "top1": 0.9, "speedup": 1.0}
        >>> pruned = {"variant": "tome 1.5x", "method": "tome", "target_speedup": 1.5, "top1": 0.89, "speedup": 1.5}
        >>> summary = summarise({"rows": [dense, pruned]})
        >>> [(target.speedup, target.best[0].variant) for target in summary.targets]
        [(1.5, 'tome 1.5x')]
    """
    rows = rows_of(document)
    score = score_of(rows)
    groups = [
        (target, own)
        for target, group in by_target(rows, score).items()
        if target is not None
        for own in _in_each_runtime(group)
    ]
    reached = [(target, [row for row in group if not missed(row)] or group) for target, group in groups]
    found = [] if score is None else [_target(target, group, score) for target, group in reached]
    timed = [(row, row.speedup) for row in rows if row is not dense_of(rows, row) and row.speedup is not None]
    return Summary(
        score,
        tuple(target for target in found if target is not None),
        tuple(row for row, speedup in timed if speedup - (row.speedup_spread or 0.0) <= 1),
        () if score is None else tuple(pair for _, group in groups for pair in _below_random(group, score)),
        tuple(row for row in rows if missed(row)),
        tuple(_unreached(entry) for entry in document.get("unreached") or []),
    )
