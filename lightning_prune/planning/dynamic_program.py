"""Dynamic programme over blocks: for every latency the counts and methods that cost the least accuracy."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from lightning_prune.planning.candidates import pareto_front

Table = NDArray[np.float64]
Mask = NDArray[np.bool_]
_GRID = 2000  # parts of the dense latency that the search distinguishes


class Solution(NamedTuple):
    """A schedule that no other beats in latency and cost.

    Attributes:
        milliseconds: Predicted latency.
        cost: Predicted cost of accuracy.
        levels: Token count that leaves each block.
        methods: Index of the method of each block; None where it removes nothing.
    """

    milliseconds: float
    cost: float
    levels: tuple[int, ...]
    methods: tuple[int | None, ...] = ()


class _Ways(NamedTuple):
    """The steps of a block that lead to one state: an entry for each."""

    rows: NDArray[np.int64]  # of the table before: the state and the count that enters
    moves: NDArray[np.int64]  # slots
    cost: Table
    methods: NDArray[np.int64]
    entering: NDArray[np.int64]


def optimal_schedules(
    levels: Sequence[int],
    milliseconds: Table,
    costs: Table,
    dense_ms: float,
    weighs: Sequence[bool] = (),
    grid: int = _GRID,
) -> list[Solution]:
    """All schedules over these levels and methods that no other beats in latency and cost, from dense to the fastest.

    The programme goes through the blocks in order and keeps, for every token count and every latency so far, only the
    cheapest way. Where some methods weight the attention of all later blocks by sizes and others do not, whether one
    has been used yet is part of what is kept. Latency is rounded to `grid` parts of dense during the search; the
    latency and cost of the result are not rounded.

    Args:
        levels: (levels,) token counts, ascending; the last is N, which enters block 0.
        milliseconds: (states, depth, methods, levels, levels) what a block adds to dense if a count enters (rows) and a
            count leaves (columns). The diagonal, a block that removes nothing, is read of the first method. Of two
            states, the second holds after a method that weights; a state may also be the only one. A dimension of size
            1 stands for any size.
        costs: (depth, methods, levels, levels) cost of accuracy of the same; inf if the step is not allowed.
        dense_ms: Latency of the unpruned model.
        weighs: Of each method, whether it weights the attention of later blocks; read where there are two states.
        grid: Number of parts of the dense latency.

    Example:
        >>> import numpy as np
        >>> from lightning_prune.planning.dynamic_program import optimal_schedules
        >>> added = np.array([[-4.0, np.inf], [-2.0, 0.0]])  # of 10 or 20 tokens
        >>> cost = np.array([[[0.0, np.inf], [1.0, 0.0]], [[0.0, np.inf], [0.2, 0.0]]])  # block 1 is less sensitive
        >>> found = optimal_schedules([10, 20], added[None, None, None], cost[:, None], 10.0)
        >>> [(point.milliseconds, point.cost, point.levels) for point in found]
        [(10.0, 0.0, (20, 20)), (8.0, 0.2, (20, 10)), (4.0, 1.0, (10, 10))]
    """
    depth, methods, count = costs.shape[:3]
    added = np.broadcast_to(milliseconds, (len(milliseconds), *costs.shape))
    states = len(added)
    leads = np.array([[state or (states > 1 and weighs[m]) for m in range(methods)] for state in range(states)], int)
    allowed = _worthwhile(added, costs, leads)
    unit = dense_ms / grid
    saved = np.rint(np.where(allowed, -added / unit, 0.0)).astype(np.int64)
    # Every block moves by at least one slot less than its slowest step loses, so that none is negative.
    offset = max(-int(saved.min()), 0)
    most = int(saved.max()) + offset
    slots = depth * most + 1
    # Slots outside are read, and never hold anything.
    width = slots + 2 * most
    best = np.full((states * count, width), np.inf)
    best[count - 1, most] = 0.0
    tables, ways_to = [best], []
    first, last = np.full(states * count, slots), np.full(states * count, -1)
    first[count - 1] = last[count - 1] = 0
    for block in range(depth):
        after = np.full_like(best, np.inf)
        first_after, last_after = np.full_like(first, slots), np.full_like(last, -1)
        found = _ways(allowed[:, block], saved[:, block] + offset, costs[block], leads, last >= 0)
        for target, ways in found.items():
            low = int((first[ways.rows] + ways.moves).min())
            high = int((last[ways.rows] + ways.moves).max())
            begin = ways.rows * width + low + most - ways.moves
            totals = sliding_window_view(best.ravel(), high - low + 1)[begin]
            totals += ways.cost[:, None]
            after[target, low + most : high + most + 1] = totals.min(0)
            first_after[target], last_after[target] = low, high
        best, first, last = after, first_after, last_after
        tables.append(best)
        ways_to.append(found)
    return _backtrack(levels, added, costs, dense_ms, tables, ways_to, most)


def _worthwhile(added: Table, costs: Table, leads: NDArray[np.int64]) -> Mask:
    """(states, depth, methods, levels, levels) the steps that are allowed and not beaten by another method.

    A method is beaten where another takes no more time, costs no more, and leads to a state that is no slower.
    """
    states, _, methods, count, _ = added.shape
    allowed = np.isfinite(added) & np.isfinite(costs)
    places = np.arange(count)
    allowed[:, :, 1:, places, places] = False  # removing nothing needs no method
    allowed &= places[None, :] <= places[:, None]
    with np.errstate(invalid="ignore"):  # inf minus inf, of steps that are not allowed
        is_ordered = states == 1 or not np.any(allowed.all(0) & (added[-1] < added[0]))
    kept = allowed.copy()
    for state in range(states):
        for method in range(methods):
            for other in range(methods):
                ahead, behind = leads[state, other], leads[state, method]
                if other == method or (ahead > behind or (not is_ordered and ahead != behind)):
                    continue
                no_worse = allowed[state, :, other] & (added[state, :, other] <= added[state, :, method])
                no_worse &= costs[:, other] <= costs[:, method]
                if other > method and ahead == behind:  # of equal ones the first stays
                    no_worse &= (added[state, :, other] < added[state, :, method]) | (
                        costs[:, other] < costs[:, method]
                    )
                kept[state, :, method] &= ~no_worse
    return kept


def _ways(
    allowed: Mask, moves: NDArray[np.int64], costs: Table, leads: NDArray[np.int64], is_reached: Mask
) -> dict[int, _Ways]:
    """The steps of a block by the row of the table that they lead to."""
    states, _, count, _ = allowed.shape
    leaving, entering, state, method = np.nonzero(allowed.transpose(3, 2, 0, 1))
    rows = state * count + entering
    targets = np.where(entering == leaving, state, leads[state, method]) * count + leaving
    order = np.flatnonzero(is_reached[rows])
    order = order[np.argsort(targets[order], kind="stable")]
    bounds = np.searchsorted(targets[order], np.arange(states * count + 1))
    found = {}
    for target, (begin, end) in enumerate(pairwise(bounds.tolist())):
        if begin < end:
            own = order[begin:end]
            step = method[own], entering[own], leaving[own]
            found[target] = _Ways(rows[own], moves[state[own], *step], costs[step], method[own], entering[own])
    return found


def _backtrack(
    levels: Sequence[int],
    added: Table,
    costs: Table,
    dense_ms: float,
    tables: Sequence[Table],
    ways_to: Sequence[dict[int, _Ways]],
    most: int,
) -> list[Solution]:
    """The schedules behind the cheapest entries of every latency, with latency and cost without rounding."""
    depth, count = len(ways_to), len(levels)
    rows, columns = tables[-1].argmin(0), np.arange(tables[-1].shape[1])
    cheapest = tables[-1][rows, columns]
    # From the fastest on, slower ones must be cheaper.
    before = np.minimum.accumulate(np.append(cheapest[1:], np.inf)[::-1])[::-1]
    columns = columns[cheapest < before]
    rows = rows[columns]
    leaving_of, method_of = np.empty((depth, len(columns)), int), np.empty((depth, len(columns)), int)
    total, cost = np.full(len(columns), dense_ms), np.zeros(len(columns))
    for block in range(depth - 1, -1, -1):
        at = rows.copy()
        for target in sorted(set(at.tolist())):
            own, ways = np.flatnonzero(at == target), ways_to[block][target]
            totals = tables[block][ways.rows[:, None], columns[own] - ways.moves[:, None]] + ways.cost[:, None]
            chosen = totals.argmin(0)
            leaving_of[block, own] = leaving = target % count
            step = block, ways.methods[chosen], ways.entering[chosen], leaving
            method_of[block, own] = np.where(ways.entering[chosen] == leaving, -1, ways.methods[chosen])
            total[own] += added[ways.rows[chosen] // count, *step]
            cost[own] += costs[step]
            columns[own], rows[own] = columns[own] - ways.moves[chosen], ways.rows[chosen]
    counts = np.array(levels)[leaving_of].T.tolist()
    used = [tuple(None if m < 0 else m for m in each) for each in method_of.T.tolist()]
    found = [
        Solution(milliseconds, loss, tuple(own), methods)
        for milliseconds, loss, own, methods in zip(total.tolist(), cost.tolist(), counts, used, strict=True)
    ]
    return pareto_front(found, key=lambda solution: (solution.milliseconds, solution.cost))[::-1]
