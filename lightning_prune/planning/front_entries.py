"""From what the dynamic programme finds to schedules that can be chosen among."""

from collections.abc import Sequence

import numpy as np

from lightning_prune.planning.blocks_plan import FrontEntry
from lightning_prune.planning.programme import FrontPoint
from lightning_prune.schedule import Schedule

_APART = 0.005  # of dense: schedules that are closer in latency are one choice


def entries_of(
    label: str, points: Sequence[FrontPoint], tokens: int, predicted: Sequence[float], timed: Sequence[float]
) -> list[FrontEntry]:
    """The schedules of a front, corrected by those that were timed: each takes so much longer as those beside it did.

    Between two that were timed, or one and dense, it is in proportion.

    Args:
        label: Of the method.
        points: As `pareto_front` gives them, dense first.
        tokens: N.
        predicted: Milliseconds of some schedules, as predicted.
        timed: Milliseconds of the same, as timed.

    Returns:
        From dense to the fastest, none as slow or as costly as another that is better in both.
    """
    dense_ms = points[0].milliseconds
    known = sorted([*zip(predicted, timed, strict=True), (dense_ms, dense_ms)])
    at = np.array([before for before, _ in known])
    longer = np.array([after for _, after in known]) / np.maximum(at, 1e-9)
    found = []
    for point in points:
        entering = (tokens, *point.levels[:-1])
        schedule = Schedule([before - after for before, after in zip(entering, point.levels, strict=True)])
        correction = float(np.interp(point.milliseconds, at, longer))
        found.append(FrontEntry(label, schedule, point.milliseconds * correction, point.cost))
    return undominated(found)


def undominated(entries: Sequence[FrontEntry]) -> list[FrontEntry]:
    """The first, dense, and of the others those that are faster than all that cost no more."""
    found = [entries[0]]
    for entry in sorted(entries[1:], key=lambda entry: (entry.cost, entry.milliseconds)):
        if entry.milliseconds < found[-1].milliseconds:
            found.append(entry)
    return found


def numbered(entries: Sequence[FrontEntry]) -> list[FrontEntry]:
    """A few of a front, from the fastest to dense: of those within half a percent of dense the one that costs least.

    Args:
        entries: From dense to the fastest; the fastest is among the few in any case.
    """
    dense = entries[0]
    bins = {
        int((dense.milliseconds - e.milliseconds) / (_APART * dense.milliseconds)): e for e in reversed(entries[1:])
    }
    chosen = {entry.schedule.removed: entry for entry in (entries[-1], *bins.values(), dense)}
    return list(chosen.values())
