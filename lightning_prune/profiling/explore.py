"""Which token counts to measure, and how often: a coarse grid, then the cliffs, within a time limit."""

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

from lightning_prune.profiling.curve import LatencyProfile
from lightning_prune.profiling.timing import Interleaved
from lightning_prune.progress import Ticker

_ROUNDS = 7  # of the coarse grid; a median of fewer is at the mercy of one load spike
_POINTS = (5, 24)  # fewest and most counts of the coarse grid
_MOST = 40  # counts, refinement included
_PRECISION = 0.01  # of the dense latency: standard error at which measuring stops

Build = Callable[[Interleaved[int], Sequence[int]], LatencyProfile]


def profile_builder(method: str, block: int, depth: int, protocol: str) -> Build:
    """Makes profiles out of what was measured so far."""

    def build(race: Interleaved[int], measured: Sequence[int]) -> LatencyProfile:
        tokens = sorted(measured)
        timings = [race.result(count) for count in tokens]
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
) -> LatencyProfile:
    """Coarse grid, then cliffs, then rounds until the figures are precise or the time is up.

    Args:
        race: Measures a token count; its clock is the one that the time limit is on.
        build: Makes a profile of the counts measured so far.
        counts: What to measure instead of a grid, or None.
        lowest: The smallest possible count.
        n: Dense.
        max_seconds: Time limit, or None for 20 rounds.
        tick: Called after every run.
    """
    start = race.clock()
    limit = start + max_seconds if max_seconds is not None else float("inf")
    race.measure([], 2, progress=tick)
    dense = race.result(n).milliseconds / 1e3
    given = counts is not None
    grid = sorted({*counts, n}) if counts is not None else _coarse(lowest, n, _affordable(dense, max_seconds))
    if max_seconds is None:
        race.measure(grid, 20, progress=tick)
        return build(race, grid)
    race.measure(grid, _ROUNDS, limit, tick)
    profile = build(race, grid)
    while not given and len(grid) < _MOST and race.clock() < start + 0.8 * max_seconds:
        inside = _inside_cliffs(profile)
        if not inside:
            break
        grid = sorted({*grid, *inside})
        race.measure(inside, _ROUNDS, limit, tick)
        profile = build(race, grid)
    while race.clock() < limit:
        loose = [count for count in grid if profile.error(count) > _PRECISION * profile.dense_ms]
        if not loose or not race.measure(loose, 2, limit, tick):
            break
        profile = build(race, grid)
    return profile


def _affordable(dense_seconds: float, max_seconds: float | None) -> int:
    """Counts of the coarse grid, so that its rounds fill about half of the time; a pruned run takes 2/3 of a dense."""
    fewest, most = _POINTS
    if max_seconds is None:
        return most
    return max(fewest, min(most, int(0.5 * max_seconds / (0.67 * dense_seconds * (_ROUNDS + 1)))))


def _coarse(lowest: int, n: int, points: int) -> list[int]:
    """Evenly spread counts from dense down to a tenth of the tokens: below, no model is worth having."""
    lowest = max(lowest, ceil(n / 10))
    return sorted({*(int(count) for count in np.linspace(min(lowest, n), n, points).round()), n})


def _inside_cliffs(profile: LatencyProfile) -> list[int]:
    """The middle of every step that saves more than its share and still hides where; the steepest four."""
    wide = [step for step in profile.cliffs() if step.above - step.below > 1]
    steepest = sorted(wide, key=profile.excess, reverse=True)[:4]
    return [(step.above + step.below) // 2 for step in steepest]
