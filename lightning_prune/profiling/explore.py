"""Which token counts to measure, and how often: a coarse grid, then the cliffs, until all is settled or time is up."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from statistics import median

import numpy as np

from lightning_prune.profiling.curve import LatencyProfile
from lightning_prune.profiling.refining import Refining, around, unsure
from lightning_prune.profiling.timing import Interleaved
from lightning_prune.progress import Ticker

_ROUNDS = 7  # of the coarse grid; a median of fewer is at the mercy of one load spike
_MORE = 4  # rounds that are added at a time
_POINTS = (5, 20)  # fewest and most counts of the coarse grid, about
_LEAST = 3  # counts besides dense that are measured, however long that takes
_NEEDED = 3  # rounds over the coarse grid, however long they take: fewer say nothing of the noise

Build = Callable[[Interleaved[int], Sequence[int]], LatencyProfile]


def profile_builder(method: str, block: int, depth: int, protocol: str) -> Build:
    """Makes profiles out of what was measured so far."""

    def build(race: Interleaved[int], measured: Sequence[int]) -> LatencyProfile:
        tokens = sorted(measured)
        levels = race.levels()
        timings = [levels[count] for count in tokens]
        return LatencyProfile(
            tokens=tuple(tokens),
            milliseconds=tuple(t.milliseconds for t in timings),
            spread=tuple(t.spread for t in timings),
            rounds=tuple(t.rounds for t in timings),
            method=method,
            block=block,
            depth=depth,
            protocol=protocol,
        )

    return build


def explore(
    race: Interleaved[int],
    build: Build,
    counts: Sequence[int] | None,
    lowest: int,
    n: int,
    max_seconds: float | None,
    tick: Ticker,
    batch: int = 1,
) -> LatencyProfile:
    """Coarse grid, then cliffs, then rounds until the figures are precise or the time is up.

    Args:
        race: Measures a token count; its clock is the one that the time limit is on.
        build: Makes a profile of the counts measured so far.
        counts: What to measure instead of a grid, or None.
        lowest: The smallest possible count.
        n: Dense.
        max_seconds: Time limit, or None for 20 rounds. Some rounds over `counts`, or over a few of the grid, are
            completed all the same.
        tick: Called after every run.
        batch: Images, which says where the tiles of the hardware may end.
    """
    start = race.clock()
    limit = start + max_seconds if max_seconds is not None else float("inf")
    race.measure([], 2, start + 0.05 * max_seconds if max_seconds is not None else limit, tick)
    dense = race.result(n).milliseconds / 1e3
    if counts is not None:
        grid = sorted({*counts, n})
    else:
        grid = coarse_grid(lowest, n, _affordable(dense, max_seconds), batch)
    if max_seconds is None:
        race.measure(grid, 20, progress=tick)
        return build(race, grid)
    whole = counts is not None or grid == coarse_grid(lowest, n, _POINTS[1], batch)
    if counts is None:
        planned, grid = grid, _warmed(race, grid, n, limit, tick)
        whole = whole and grid == planned
    race.measure(grid, _ROUNDS, limit, tick, least=_NEEDED)
    profile = build(race, grid)
    refining = Refining(frozenset(grid), open=counts is None)
    first_run = median(race.warm(count) for count in grid)
    while race.clock() < limit:
        left = limit - race.clock()
        # A new count is run once, and then in rounds beside its two neighbours.
        affordable = int((left - dense) / (first_run + 3 * dense)) if left > 0.2 * max_seconds else 0
        inside = refining.next(profile, affordable)
        wanting = [count for count in unsure(profile) if count not in inside]
        if inside:
            # Beside its neighbours, so that what they differ by is free of all that changes from round to round.
            beside = {count for new in inside for count in around(profile.tokens, new)}
            grid = sorted({*grid, *inside})
            race.measure(sorted({*inside, *beside}), _ROUNDS, limit, tick)
        elif not wanting:
            return replace(profile, settled=whole and not refining.cut)
        elif not race.measure(wanting, _MORE, limit, tick):
            break
        profile = build(race, grid)
    return profile


def _warmed(race: Interleaved[int], grid: Sequence[int], n: int, limit: float, tick: Ticker) -> list[int]:
    """The counts of the grid, run once; only some, evenly spread, where there is no time for some rounds over all.

    Of a model that is compiled for each count a first run takes seconds, and any run of a large model may.
    """
    dense = race.result(n).milliseconds / 1e3
    chosen, rest = [n], set(grid) - {n}
    while rest:
        needed = race.warm(chosen[-1]) + _NEEDED * (len(chosen) + 1) * dense
        if len(chosen) > _LEAST and race.clock() + needed > limit:
            break
        count = max(sorted(rest), key=lambda each: min(abs(each - other) for other in chosen))
        race.warm(count)
        tick()
        chosen.append(count)
        rest.remove(count)
    return sorted(chosen)


def coarse_grid(lowest: int, n: int, points: int, batch: int) -> list[int]:
    """Evenly spread counts from dense down to a tenth of the tokens: below, no model is worth having.

    They lie where rows of the batch end a tile if tiles are powers of two: a cliff is then just above a count of the
    grid, where it is looked for first.

    Args:
        lowest: The smallest possible count.
        n: Dense.
        points: About how many.
        batch: Images.

    Example:
        >>> from lightning_prune.profiling.explore import coarse_grid
        >>> coarse_grid(lowest=3, n=197, points=6, batch=1)
        [32, 64, 96, 128, 160, 192, 196, 197]
    """
    lowest = min(max(lowest, ceil(n / 10)), n)
    rows = 2 ** round(np.log2(max(batch * (n - lowest) / points, 1)))
    aligned = (rows * tile // batch for tile in range(batch * n // rows + 1))
    first = max(n - 1, lowest)  # what a cut costs by itself, which the step from dense would hide
    return sorted({n, first, *(count for count in aligned if lowest <= count <= n)})


def _affordable(dense_seconds: float, max_seconds: float | None) -> int:
    """Counts of the coarse grid, so that its rounds fill about half of the time; a pruned run takes 2/3 of a dense."""
    fewest, most = _POINTS
    if max_seconds is None:
        return most
    return max(fewest, min(most, int(0.5 * max_seconds / (0.67 * dense_seconds * (_ROUNDS + 1)))))
