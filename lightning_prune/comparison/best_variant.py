"""The best variant of a comparison by an objective: the one to deploy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_prune.comparison.planned_variants import PlannedVariant
from lightning_prune.planning import Objective
from lightning_prune.report.rows import AGREEMENT, TOP1, Row, score_of


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
    meets the budget. If neither a variant nor dense does, the fastest is chosen.

    Args:
        rows: Dense first.
        planned: The same variants.
        objective: What was stated.
    """
    schedules = {each.variant: each.schedule for each in planned}
    dense, score = rows[0], score_of(rows) or AGREEMENT
    whole = (dense.top1 if score == TOP1 else 1.0) or 1.0
    candidates = [
        row
        for row in rows[1:]
        if row.speedup and not row.int8 and schedules[row.variant] is not None and score.of(row) is not None
    ]
    dense_ms = dense.latency_ms or 0.0
    latency = np.array([*(dense_ms / (row.speedup or 1.0) for row in candidates), dense_ms])
    accuracy = np.array([*((score.of(row) or 0.0) / whole for row in candidates), 1.0])
    highest = accuracy.copy()
    for number, row in enumerate(candidates):
        if score == TOP1 and row.top1_high is not None and dense.top1 is not None:
            highest[number] = max(accuracy[number], (dense.top1 + row.top1_high) / whole)
    values, doubtful = objective.score(latency, accuracy.copy()), objective.score(latency, highest.copy())
    if np.isfinite(values[:-1]).any() or (np.isfinite(values[-1]) and not np.isfinite(doubtful[:-1]).any()):
        row = [*candidates, dense][int(len(values) - 1 - np.argmax(values[::-1]))]
        if row is dense:
            return BestVariant(row.variant, f"No other variant is better than dense by {objective}.", True)
        reason = f"The best of {len(rows)} variants by {objective}: {_figures(row, dense)}."
        return BestVariant(row.variant, reason, True)
    if np.isfinite(doubtful[:-1]).any():
        row = candidates[int(np.argmax(doubtful[:-1]))]
        reason = f"Within the 95% interval of its accuracy the best of {len(rows)} variants by {objective}"
        return BestVariant(row.variant, f"{reason}: {_figures(row, dense)}.", True)
    row = max([dense, *candidates], key=lambda row: row.speedup or 1.0)
    return BestVariant(row.variant, f"No variant meets the {objective}. The fastest is {_figures(row, dense)}.", False)


def _figures(row: Row, dense: Row) -> str:
    speedup = f"{row.variant}, {row.speedup or 1.0:.2f}x"
    score = TOP1 if row.top1 is not None else AGREEMENT
    share = 1.0 if row is dense and score == AGREEMENT else score.of(row)
    if share is None:
        return speedup
    against = (
        f" ({100 * dense.top1:.2f}% dense)" if score == TOP1 and dense.top1 is not None and row is not dense else ""
    )
    return f"{speedup}, {100 * share:.2f}% {score.label}{against}"
