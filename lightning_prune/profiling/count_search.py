"""Searching for the token counts at which latency has its cliffs, in few runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import median

import numpy as np

from lightning_prune._utils.progress import OnStep
from lightning_prune.profiling.interleaved_timer import InterleavedTimer
from lightning_prune.profiling.latency_profile import CountStep, LatencyProfile

_DECIDED = 31  # rounds after which a step that may hide a cliff is looked into
_ENOUGH = 63  # rounds of a count, after which it is taken as it is
_MOST = 40  # counts, refinement included
_AT_ONCE = 4  # steps that are refined before the next look at all of them
_PRECISION = 0.007  # of the dense latency: standard error at which a count is known well enough
_SOUGHT = 0.042  # of the dense latency: what a token must save to be looked for, with room for cliffs of 5%
_SURE = 2.0  # standard errors


@dataclass
class CliffSearch:
    """Where to look for cliffs next.

    Attributes:
        grid: The coarse grid, which lies where tiles may end.
        open: Whether there is anything left to look for.
        cut: Whether there was, but no time.
        lucky: Looks just above a count of the grid that were right, less those that were not.
        looked: Counts of the grid that were looked above, and of which it is not known yet.
    """

    grid: frozenset[int]
    open: bool
    cut: bool = False
    lucky: int = 0
    looked: set[int] = field(default_factory=set)

    def next(self, profile: LatencyProfile, affordable: int) -> list[int]:
        """Counts to measure: none when every step is known to hide no cliff, or nothing more may be measured.

        Args:
            profile: What is known.
            affordable: For how many more counts there is time.
        """
        if not self.open:
            return []
        for below in sorted(self.looked):
            self._judge(profile, below)
        wide = [step for step in profile.steps() if step.above - step.below > 1]
        hiding = [step for step in wide if hides(profile, step) is not False]
        room = min(_AT_ONCE, _MOST - len(profile.tokens), affordable)
        self.cut = bool(hiding) and affordable < 1
        self.open = bool(hiding) and room > 0
        largest = sorted(hiding, key=lambda step: step.saved, reverse=True)[: max(room, 0)]
        return [self._within(step) for step in largest if hides(profile, step)]

    def _within(self, step: CountStep) -> int:
        """The middle, or just above the lower end where cliffs were found to be there."""
        unproven = self.lucky < 0 or (self.lucky == 0 and bool(self.looked))
        if unproven or not {step.above, step.below} <= self.grid:
            return (step.above + step.below) // 2
        self.looked.add(step.below)
        return step.below + 1

    def _judge(self, profile: LatencyProfile, below: int) -> None:
        """Whether the token just above `below` has most of what the step that it was part of saved."""
        step = next(s for s in profile.steps() if s.below == below)
        if step.above == below + 1:
            self.lucky += 1 if step.saved > _SOUGHT * profile.dense_ms else -1
            self.looked.discard(below)


def hides(profile: LatencyProfile, step: CountStep) -> bool | None:
    """Whether a step saves enough to hide a cliff, as all that it saves may be saved by one token; None: not known.

    After many rounds one that may is taken for one that does: a count too many costs less than a cliff too few.
    """
    beyond, noise = step.saved - _SOUGHT * profile.dense_ms, profile.noise(step)
    known = min(_rounds(profile, step)) >= _DECIDED
    if beyond < -_SURE * noise:
        return False
    return True if known or beyond > noise else None


def _rounds(profile: LatencyProfile, step: CountStep) -> tuple[int, int]:
    """Measurements behind the two ends of a step."""
    return profile.rounds[profile.tokens.index(step.above)], profile.rounds[profile.tokens.index(step.below)]


def unsure(profile: LatencyProfile) -> list[int]:
    """Counts that more rounds are to be spent on: those that are not precise, and the ends of undecided steps."""
    found = {count for count in profile.tokens if profile.error(count) > _PRECISION * profile.dense_ms}
    cliffs = profile.cliffs()
    for step in profile.steps():
        if step in cliffs and min(_rounds(profile, step)) < _DECIDED:
            undecided = True  # a verdict that a few lucky rounds may have made
        elif step.above - step.below > 1:
            undecided = hides(profile, step) is None
        else:  # is it a cliff?
            sure = profile.significance * profile.noise(step)
            undecided = sure > 0.3 * _SOUGHT * profile.dense_ms and abs(profile.excess(step) - sure) < sure
        if undecided:
            found |= {step.above, step.below}
    return sorted(c for c in found if profile.rounds[profile.tokens.index(c)] < _ENOUGH)


def around(tokens: Sequence[int], count: int) -> list[int]:
    """The measured neighbours of a count that is not measured yet."""
    place = int(np.searchsorted(tokens, count))
    return list(tokens[max(place - 1, 0) : place + 1])


_ROUNDS = 7  # of the coarse grid; a median of fewer is at the mercy of one load spike
_MORE = 4  # rounds that are added at a time
_POINTS = (5, 20)  # fewest and most counts of the coarse grid, about
_LEAST = 3  # counts besides dense that are measured, however long that takes
_NEEDED = 3  # rounds over the coarse grid, however long they take: fewer say nothing of the noise

Build = Callable[[InterleavedTimer[int], Sequence[int]], LatencyProfile]


def profile_builder(method: str, block: int, depth: int, protocol: str) -> Build:
    """Makes profiles out of what was measured so far."""

    def build(race: InterleavedTimer[int], measured: Sequence[int]) -> LatencyProfile:
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
    race: InterleavedTimer[int],
    build: Build,
    counts: Sequence[int] | None,
    lowest: int,
    n: int,
    time_limit: float | None,
    tick: OnStep,
    batch: int = 1,
) -> LatencyProfile:
    """Coarse grid, then cliffs, then rounds until the figures are precise or the time is up.

    Args:
        race: Measures a token count; its clock is the one that the time limit is on.
        build: Makes a profile of the counts measured so far.
        counts: What to measure instead of a grid, or None.
        lowest: The smallest possible count.
        n: Dense.
        time_limit: Time limit, or None for 20 rounds. Some rounds over `counts`, or over a few of the grid, are
            completed all the same.
        tick: Called after every run.
        batch: Images, which says where the tiles of the hardware may end.
    """
    start = race.clock()
    limit = start + time_limit if time_limit is not None else float("inf")
    race.measure([], 2, start + 0.05 * time_limit if time_limit is not None else limit, tick)
    dense = race.result(n).milliseconds / 1e3
    grid = sorted({*counts, n}) if counts is not None else coarse_grid(lowest, n, _affordable(dense, time_limit), batch)
    if time_limit is None:
        race.measure(grid, 20, progress=tick)
        return build(race, grid)
    whole = counts is not None or grid == coarse_grid(lowest, n, _POINTS[1], batch)
    if counts is None:
        planned, grid = grid, _warmed(race, grid, n, limit, tick)
        whole = whole and grid == planned
    race.measure(grid, _ROUNDS, limit, tick, least=_NEEDED)
    profile = build(race, grid)
    refining = CliffSearch(frozenset(grid), open=counts is None)
    first_run = median(race.warm(count) for count in grid)
    while race.clock() < limit:
        left = limit - race.clock()
        # A new count is run once, and then in rounds beside its two neighbours.
        affordable = int((left - dense) / (first_run + 3 * dense)) if left > 0.2 * time_limit else 0
        inside = refining.next(profile, affordable)
        wanting = [count for count in unsure(profile) if count not in inside]
        if inside:
            # Beside its neighbours, so that what they differ by is free of all that changes from round to round.
            beside = {count for new in inside for count in around(profile.tokens, new)}
            grid = sorted({*grid, *inside})
            race.measure(sorted({*inside, *beside}), _ROUNDS, limit, tick)
        elif not wanting:
            return replace(profile, converged=whole and not refining.cut)
        elif not race.measure(wanting, _MORE, limit, tick):
            break
        profile = build(race, grid)
    return profile


def _warmed(race: InterleavedTimer[int], grid: Sequence[int], n: int, limit: float, tick: OnStep) -> list[int]:
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
        >>> from lightning_prune.profiling.count_search import coarse_grid
        >>> coarse_grid(lowest=3, n=197, points=6, batch=1)
        [32, 64, 96, 128, 160, 192, 196, 197]
    """
    lowest = min(max(lowest, ceil(n / 10)), n)
    rows = 2 ** round(np.log2(max(batch * (n - lowest) / points, 1)))
    aligned = (rows * tile // batch for tile in range(batch * n // rows + 1))
    first = max(n - 1, lowest)  # what a cut costs by itself, which the step from dense would hide
    return sorted({n, first, *(count for count in aligned if lowest <= count <= n)})


def _affordable(dense_seconds: float, time_limit: float | None) -> int:
    """Counts of the coarse grid, so that its rounds fill about half of the time; a pruned run takes 2/3 of a dense."""
    fewest, most = _POINTS
    if time_limit is None:
        return most
    return max(fewest, min(most, int(0.5 * time_limit / (0.67 * dense_seconds * (_ROUNDS + 1)))))
