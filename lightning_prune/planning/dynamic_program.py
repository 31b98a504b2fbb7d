"""Dynamic programme over blocks: for every latency the schedule that costs the least accuracy."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prune.planning.results import pareto_front

Table = NDArray[np.float64]


class Solution(NamedTuple):
    """A schedule that no other beats in latency and cost.

    Attributes:
        milliseconds: Predicted latency.
        cost: Predicted cost of accuracy.
        levels: Token count that leaves each block.
    """

    milliseconds: float
    cost: float
    levels: tuple[int, ...]


def optimal_schedules(
    levels: Sequence[int], milliseconds: Table, costs: Table, dense_ms: float, grid: int = 4000
) -> list[Solution]:
    """All schedules over these levels that no other beats in latency and cost, from dense to the fastest.

    The programme goes through the blocks in order and keeps, for every token count and every latency so far, only the
    cheapest way. Latency is rounded to `grid` parts of dense during the search; the latency and cost of the result are
    not rounded.

    Args:
        levels: (levels,) token counts, ascending; the last is N, which enters block 0.
        milliseconds: (levels, levels) what a block adds to dense if a count enters (rows) and a count leaves (columns).
        costs: (depth, levels, levels) cost of accuracy of the same; inf if the step is not allowed.
        dense_ms: Latency of the unpruned model.
        grid: Number of parts of the dense latency.

    Example:
        >>> import numpy as np
        >>> from lightning_prune.planning.dynamic_program import optimal_schedules
        >>> added = np.array([[-4.0, np.inf], [-2.0, 0.0]])  # of 10 or 20 tokens
        >>> cost = np.array([[[0.0, np.inf], [1.0, 0.0]], [[0.0, np.inf], [0.2, 0.0]]])  # block 1 is less sensitive
        >>> [(point.milliseconds, point.cost, point.levels) for point in optimal_schedules([10, 20], added, cost, 10.0)]
        [(10.0, 0.0, (20, 20)), (8.0, 0.2, (20, 10)), (4.0, 1.0, (10, 10))]
    """
    depth, count = len(costs), len(levels)
    unit = dense_ms / grid
    # Every block saves at most what its fastest step does; slots count what is saved, so none is negative.
    saved = np.where(np.isfinite(milliseconds), -milliseconds / unit, -np.inf)
    lowest, highest = np.minimum(np.nanmin(np.where(np.isfinite(saved), saved, 0.0)), 0.0), saved.max()
    offset = int(np.ceil(-lowest))
    slots = depth * (int(np.ceil(max(highest, 0.0))) + offset) + 1
    best = np.full((count, slots), np.inf)
    best[count - 1, 0] = 0.0
    came_from = np.full((depth, count, slots), -1, dtype=np.int16)
    for block in range(depth):
        after = np.full((count, slots), np.inf)
        for entering in range(count):
            if not np.isfinite(best[entering]).any():
                continue
            for leaving in range(entering + 1):
                cost = costs[block, entering, leaving]
                if not np.isfinite(cost):
                    continue
                shift = int(np.rint(saved[entering, leaving])) + offset
                moved = best[entering, : slots - shift] + cost
                better = moved < after[leaving, shift:]
                np.copyto(after[leaving, shift:], moved, where=better)
                np.copyto(came_from[block, leaving, shift:], entering, where=better)
        best = after
    return _backtrack(levels, milliseconds, costs, dense_ms, best, came_from, np.rint(saved), offset)


def _backtrack(
    levels: Sequence[int],
    milliseconds: Table,
    costs: Table,
    dense_ms: float,
    best: Table,
    came_from: NDArray[np.int16],
    saved: Table,
    offset: int,
) -> list[Solution]:
    """The schedules behind the cheapest entries of every latency, with latency and cost without rounding."""
    found: list[Solution] = []
    cheapest = np.inf
    for slot in range(best.shape[1] - 1, -1, -1):  # the fastest first; slower ones must be cheaper
        last = int(np.argmin(best[:, slot]))
        if not best[last, slot] < cheapest:
            continue
        cheapest = best[last, slot]
        places = [last]
        place = slot
        for block in range(len(came_from) - 1, -1, -1):
            entering = int(came_from[block, places[0], place])
            place -= int(saved[entering, places[0]]) + offset
            places.insert(0, entering)
        steps = list(pairwise(places))
        total = dense_ms + sum(float(milliseconds[step]) for step in steps)
        cost = sum(float(costs[block][step]) for block, step in enumerate(steps))
        found.append(Solution(total, cost, tuple(int(levels[leaving]) for _, leaving in steps)))
    return pareto_front(found, key=lambda solution: (solution.milliseconds, solution.cost))[::-1]
