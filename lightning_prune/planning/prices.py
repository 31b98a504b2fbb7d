"""What a method costs besides the tokens, from schedules that are timed beside dense."""

from collections.abc import Iterable, Sequence
from math import sqrt

import numpy as np

from lightning_prune.planning.goals import error_of
from lightning_prune.planning.latency_model import LatencyModel, Price
from lightning_prune.profiling import Timing
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

_SUREST = 0.003  # of dense: the model is no better than that, however well a schedule was timed
_ONE_ROUND = 0.03  # of dense: few rounds may agree by chance, and one has no spread at all


def probes(reduction: Reduction, tokens: int, prefix_tokens: int, depth: int, first: int) -> dict[str, Schedule]:
    """Schedules that tell the prices apart: one block early, one late, four, and three of which two find few tokens.

    Args:
        reduction: The method.
        tokens: N.
        prefix_tokens: P.
        depth: Blocks.
        first: The first block that can reduce.
    """
    middle = (first + depth) // 2
    wanted: dict[str, list[tuple[int, int]]] = {  # block, tokens that it is to remove
        "early": [(first, tokens // 2)],
        "late": [(max(depth - 2, first), tokens // 3)],
        "four": [(block, tokens // 12) for block in np.linspace(first, depth - 1, 4).astype(int).tolist()],
        "few": [(first, tokens * 2 // 3), (middle, tokens // 12), (depth - 1, tokens // 12)],
    }
    found: dict[str, Schedule] = {}
    for name, cuts in wanted.items():
        removed, left = [0] * depth, tokens
        for block, cut in dict(cuts).items():
            removed[block] = min(max(cut, 1), reduction.capacity(left, prefix_tokens))
            left -= removed[block]
        found[name] = Schedule(removed)
    return found


def price_of(model: LatencyModel, timed: Iterable[tuple[Schedule, Timing]]) -> Price:
    """The prices, none below 0, that explain best by how much schedules are slower than their tokens alone would be.

    Args:
        model: Of the tokens alone.
        timed: Schedules with their timings, of which the ratio to dense counts; the surer ones weigh more.
    """
    from sklearn.linear_model import LinearRegression  # takes a second to import

    rows: list[Sequence[float]] = []
    lacking: list[float] = []
    weights: list[float] = []
    n = int(model.levels[-1])
    for schedule, timing in timed:
        reducing = schedule.reducing
        if not reducing:
            continue
        entering = (n, *schedule.tokens(n))
        share = sum(entering[block] for block in reducing) / n
        rows.append((len(reducing), share, model.depth - 1 - min(reducing)))
        lacking.append(timing.ratio * model.dense_ms - model.predict(schedule))
        weights.append(1 / max(error_of(timing), _SUREST, _ONE_ROUND / sqrt(timing.rounds)) ** 2)
    if not rows:
        return Price()
    fitted = LinearRegression(fit_intercept=False, positive=True).fit(rows, lacking, sample_weight=weights)
    return Price(*map(float, fitted.coef_))
