"""The best variant of a comparison by an objective: the one to deploy."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from lightning_prune.comparison.planned_variants import PlannedVariant
from lightning_prune.comparison.requests import INT8_NAME
from lightning_prune.planning import AccuracyBudget, LatencyBudget, Objective
from lightning_prune.profiling import DENSE_ACCURACY, Estimate
from lightning_prune.profiling.accuracy_proxy import Z95
from lightning_prune.report.rows import AGREEMENT, TOP1, Row, Score, interval_of, score_of
from lightning_prune.runtimes import parse_runtime


@dataclass(frozen=True)
class BestVariant:
    """The variant to deploy.

    Attributes:
        variant: Its name.
        reason: Why it is the best, or that none meets the budget.
        met: Whether it meets the objective.
    """

    variant: str
    reason: str
    met: bool


def choose_best(rows: Sequence[Row], planned: Sequence[PlannedVariant], objective: Objective) -> BestVariant:
    """The best variant by an objective, from measured latencies and validated accuracies.

    A variant that misses an accuracy budget, but whose 95% interval reaches it, is chosen only if no other variant
    meets the budget. With a `confidence`, the lower bound of its accuracy has to meet it instead. If neither a variant
    nor dense does, the fastest is chosen.

    Args:
        rows: Dense first. With several runtimes, speed-ups of a budget refer to dense in the first, and dense in
            another is a variant like the others.
        planned: The same variants. In 8 bits they count where the runtime quantizes: elsewhere nothing deploys them.
        objective: What was stated.
    """
    deployable = {each.variant for each in planned if _is_deployable(each)}
    dense, score = rows[0], _relative_score(rows)
    whole = (dense.top1 if score == TOP1 else 1.0) or 1.0
    shares = {row.variant: _relative(row, dense, score) for row in rows}
    candidates = [
        row for row in rows[1:] if row.speedup and row.variant in deployable and shares[row.variant] is not None
    ]
    tail = isinstance(objective, LatencyBudget) and objective.percentile == 90
    latency = np.array([(row.latency_p90_ms if tail else row.latency_ms) or 0.0 for row in [*candidates, dense]])
    accuracy = np.array([*(shares[row.variant] or 0.0 for row in candidates), 1.0])
    highest = accuracy.copy()
    for number, row in enumerate(candidates):
        if score == TOP1 and row.top1_high is not None and dense.top1 is not None:
            highest[number] = max(accuracy[number], (dense.top1 + row.top1_high) / whole)
    if isinstance(objective, AccuracyBudget) and objective.confidence > 0.5:
        # The lower bound has to meet the budget, so that there is no doubt that could speak for a variant.
        stderr = [_stderr(row, score) / whole for row in candidates]
        accuracy = objective.judged([*map(Estimate, accuracy[:-1], stderr), DENSE_ACCURACY])
        highest = accuracy
    values, doubtful = objective.score(latency, accuracy.copy()), objective.score(latency, highest.copy())
    if np.isfinite(values[:-1]).any() or (np.isfinite(values[-1]) and not np.isfinite(doubtful[:-1]).any()):
        row = [*candidates, dense][_best(values, accuracy)]
        if row is dense:
            return BestVariant(row.variant, f"No other variant is better than dense by {objective}.", True)
        reason = f"The best of {1 + len(candidates)} variants by {objective}: {_figures(row, dense)}."
        return BestVariant(row.variant, reason + _executed(row, planned), True)
    if np.isfinite(doubtful[:-1]).any():
        row = candidates[_best(doubtful[:-1], accuracy[:-1])]
        reason = f"Within the 95% interval of its accuracy the best of {1 + len(candidates)} variants by {objective}"
        return BestVariant(row.variant, f"{reason}: {_figures(row, dense)}.{_executed(row, planned)}", True)
    row = min([dense, *candidates], key=lambda row: row.latency_ms or float("inf"))
    reason = f"No variant meets the {objective}. The fastest is {_figures(row, dense)}.{_executed(row, planned)}"
    return BestVariant(row.variant, reason, False)


def _best(values: NDArray[np.float64], accuracy: NDArray[np.float64]) -> int:
    """Index of the largest value; of equal ones the most accurate, and of these the last."""
    ties = np.flatnonzero(values == values.max())[::-1]
    return int(ties[np.argmax(accuracy[ties])])


def _executed(row: Row, planned: Sequence[PlannedVariant]) -> str:
    """A sentence that says the runtime in which a variant in 8 bits runs; empty for others."""
    chosen = next(each for each in planned if each.variant == row.variant)
    return f" It runs in `{chosen.execution}`." if chosen.int8 else ""


def _is_deployable(planned: PlannedVariant) -> bool:
    """Whether a schedule and a runtime are all that it takes to run a variant."""
    removes_by_schedule = planned.schedule is not None or not planned.method or planned.method == INT8_NAME
    return removes_by_schedule and (not planned.int8 or parse_runtime(planned.runtime).converts)


def _relative_score(rows: Sequence[Row]) -> Score:
    """What ranks the rows, if shares of dense can be made of it: a metric that may be negative has none."""
    score = score_of(rows) or AGREEMENT
    known = [figure for row in rows if (figure := score.of(row)) is not None]
    return AGREEMENT if score.key == "metric" and min(known) <= 0 else score


def _relative(row: Row, dense: Row, score: Score) -> float | None:
    """The score of a row over that of dense, so that 1 is as good as dense; None where it is not known."""
    figure, whole = score.of(row), score.of(dense) or 1.0
    if score == AGREEMENT:
        return 1.0 if figure is None and not row.method and not row.int8 else figure  # dense agrees with itself
    if figure is None:
        return None
    return whole / figure if score.lower_is_better else figure / whole


def _stderr(row: Row, score: Score) -> float:
    """The standard error of the score of a row, against dense on the same images where that is known."""
    interval = interval_of(row)
    if score == TOP1 and interval is not None:
        return (interval[1] - interval[0]) / (2 * Z95)
    if score == AGREEMENT and row.agreement is not None and row.images:
        return sqrt(row.agreement * (1 - row.agreement) / row.images)
    return inf


def _figures(row: Row, dense: Row) -> str:
    ratio = (dense.latency_ms or 1.0) / (row.latency_ms or dense.latency_ms or 1.0)
    speedup = f"{row.variant}, {ratio:.2f}x"
    score = score_of([row]) or AGREEMENT
    share = 1.0 if row is dense and score == AGREEMENT else score.of(row)
    if share is None:
        return speedup
    whole = None if score == AGREEMENT or row is dense else score.of(dense)
    against = "" if whole is None else f" ({score.text(whole)} dense)"
    return f"{speedup}, {score.text(share)} {score.label}{against}"
