"""What a method costs besides the tokens, from a few schedules that are timed beside dense."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lightning_prune.planning.latency_model import LatencyModel, Price
from lightning_prune.profiling import Timing
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

Time = Callable[[Mapping[str, Schedule]], Mapping[str, Timing]]


def probes(reduction: Reduction, tokens: int, prefix_tokens: int, depth: int, first: int) -> dict[str, Schedule]:
    """Schedules that tell the two prices apart: one block early, one late, two, and four.

    Args:
        reduction: The method.
        tokens: N.
        prefix_tokens: P.
        depth: Blocks.
        first: The first block that can reduce.
    """
    places = {
        "early": [first],
        "late": [max(depth - 2, first)],
        "two": [first, (first + depth) // 2],
        "four": np.linspace(first, depth - 1, 4).astype(int).tolist(),
    }
    found: dict[str, Schedule] = {}
    for name, blocks in places.items():
        removed, left = [0] * depth, tokens
        for block in dict.fromkeys(blocks):
            removed[block] = min(tokens // (3 * len(set(blocks))), reduction.capacity(left, prefix_tokens))
            left -= removed[block]
        found[name] = Schedule(removed)
    return found


def price_of(model: LatencyModel, schedules: Mapping[str, Schedule], timings: Mapping[str, Timing]) -> Price:
    """The prices that explain best by how much the schedules are slower than their tokens alone would be.

    Args:
        model: Of the tokens alone.
        schedules: What was timed.
        timings: Its timings; the ratio to dense counts.
    """
    rows: list[Sequence[float]] = []
    lacking: list[float] = []
    for name, schedule in schedules.items():
        reducing = schedule.reducing
        if not reducing:
            continue
        n = int(model.levels[-1])
        entering = (n, *schedule.tokens(n))
        rows.append((sum(entering[block] for block in reducing) / n, model.depth - 1 - min(reducing)))
        lacking.append(timings[name].ratio * model.dense_ms - model.predict(schedule))
    if not rows:
        return Price()
    counts, missing = np.array(rows, dtype=float), np.array(lacking)
    (reducing_ms, after_ms), *_ = np.linalg.lstsq(counts, missing, rcond=None)
    if after_ms < 0:  # noise: nothing becomes faster by having been reduced before
        reducing_ms, after_ms = counts[:, 0] @ missing / (counts[:, 0] @ counts[:, 0]), 0.0
    elif reducing_ms < 0:
        reducing_ms, after_ms = 0.0, counts[:, 1] @ missing / (counts[:, 1] @ counts[:, 1])
    return Price(max(float(reducing_ms), 0.0), max(float(after_ms), 0.0))
