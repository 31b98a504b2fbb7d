"""From the solutions of the dynamic programme to candidates: their latencies corrected by timings, and a selection."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from lightning_prune.planning.candidates import Candidate, pareto_front
from lightning_prune.planning.dynamic_program import Solution
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import MethodSpec, Schedule

T = TypeVar("T")
LATENCY_STEP_RATIO = 0.005
"""Candidates whose latencies differ by less than this share of dense are one choice."""


def corrected_front(
    label: str,
    reduction: Reduction | None,
    solutions: Sequence[Solution],
    tokens: int,
    predicted: Sequence[float],
    measured: Sequence[float],
    specs: Sequence[MethodSpec] = (),
) -> list[Candidate]:
    """The candidates of a front, with latencies corrected by those that were timed.

    The ratio of measured to predicted latency is interpolated between the timed schedules; it is 1 for dense.

    Args:
        label: Name of the method.
        reduction: The method; None where blocks have different ones.
        solutions: As `optimal_schedules` returns them, dense first.
        tokens: N.
        predicted: Predicted latency over dense of the timed schedules.
        measured: Measured latency over dense of the same.
        specs: The methods that the solutions name, if blocks have different ones.

    Returns:
        Dense, and those that are faster than all that cost no more, to the fastest.
    """
    dense_ms = solutions[0].milliseconds
    known = sorted([*zip(predicted, measured, strict=True), (1.0, 1.0)])
    at = np.array([before for before, _ in known])
    corrections = np.array([after for _, after in known]) / np.maximum(at, 1e-9)
    candidates = []
    for solution in solutions:
        entering = (tokens, *solution.levels[:-1])
        removed = [before - after for before, after in zip(entering, solution.levels, strict=True)]
        schedule = Schedule(removed, [None if m is None else specs[m] for m in solution.methods] if specs else None)
        ratio = solution.milliseconds / dense_ms
        ratio *= float(np.interp(ratio, at, corrections))
        candidates.append(Candidate(label, reduction, schedule, ratio, solution.cost))
    dense, *others = candidates
    dense = replace(dense, accuracy=1.0)
    return [dense, *(c for c in pareto_front(others, lambda c: (c.cost, c.ratio)) if c.ratio < dense.ratio)]


def thinned(front: Sequence[Candidate]) -> list[Candidate]:
    """A selection of a front, from the fastest to dense: in each half percent of latency the one that costs least.

    Args:
        front: From dense to the fastest; the fastest is always selected.
    """
    bins = {int((1 - c.ratio) / LATENCY_STEP_RATIO): c for c in reversed(front[1:])}
    return list({c.schedule: c for c in (front[-1], *bins.values(), front[0])}.values())


def evenly_spaced(items: Sequence[T], number: int) -> list[T]:
    """At most `number` of the items at even distances, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[place] for place in dict.fromkeys(places.tolist())]
