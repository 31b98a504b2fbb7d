"""Chooses the token counts to measure: a coarse grid, then the cliffs, until all are precise or the time is up.

It needs numpy alone, as `lightning_prune.bundle` copies this file to devices without torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import median

import numpy as np

from lightning_prune.profiling.interleaved_timer import InterleavedTimer
from lightning_prune.profiling.latency_profile import CountStep, LatencyProfile

OnStep = Callable[[], None]


@dataclass(frozen=True)
class _Grid:
    """The coarse grid and its rounds.

    Attributes:
        rounds: Rounds over the grid; the median of fewer is easily moved by one load spike.
        extra_rounds: Rounds added at a time afterwards.
        min_counts: Smallest size of the grid, about.
        max_counts: Largest size of the grid, about.
        required_counts: Counts besides dense that are measured even after the deadline.
        required_rounds: Rounds over the grid that are completed even after the deadline; fewer do not show the noise.
        unlimited_rounds: Rounds where there is no time limit.
        min_tokens_of_dense: Smallest count, as a share of the tokens; fewer are of no use in a model.
        pruned_run_of_dense: Assumed mean latency over the grid, as a share of the dense latency.
        share_of_time: Share of the time limit that the grid may take.
    """

    rounds: int = 7
    extra_rounds: int = 4
    min_counts: int = 5
    max_counts: int = 20
    required_counts: int = 3
    required_rounds: int = 3
    unlimited_rounds: int = 20
    min_tokens_of_dense: float = 0.1
    pruned_run_of_dense: float = 0.67
    share_of_time: float = 0.5


@dataclass(frozen=True)
class _Cliffs:
    """The search for cliffs. Shares are of the dense latency.

    Attributes:
        decisive_rounds: Rounds after which a step that may hide a cliff is refined.
        max_rounds: Rounds of a count after which it is not measured again.
        max_counts: Number of counts, refined ones included.
        steps_at_once: Steps that are refined before all of them are looked at again.
        precision: Standard error at which a count is precise enough.
        min_drop: Drop at a single token that is searched for; below 5% to leave room for noise.
        confidence_sigmas: Standard errors by which a step must save less than `min_drop` to hide no cliff.
        undecided_noise_of_drop: Noise of a single-token step, as a share of `min_drop`, below which it needs no
            more rounds.
        refinement_of_time: Share of the time limit that must be left to measure another count.
    """

    decisive_rounds: int = 31
    max_rounds: int = 63
    max_counts: int = 40
    steps_at_once: int = 4
    precision: float = 0.007
    min_drop: float = 0.042
    confidence_sigmas: float = 2.0
    undecided_noise_of_drop: float = 0.3
    refinement_of_time: float = 0.2


_GRID, _CLIFFS = _Grid(), _Cliffs()

BuildProfile = Callable[[InterleavedTimer[int], Sequence[int]], LatencyProfile]


def profile_builder(method: str, block: int, depth: int, protocol: str) -> BuildProfile:
    """Returns a function that makes a profile of what was measured so far."""

    def build(timer: InterleavedTimer[int], measured: Sequence[int]) -> LatencyProfile:
        tokens = sorted(measured)
        levels = timer.levels()
        stats = [levels[count] for count in tokens]
        return LatencyProfile(
            tokens=tuple(tokens),
            milliseconds=tuple(s.milliseconds for s in stats),
            spread=tuple(s.spread for s in stats),
            rounds=tuple(s.rounds for s in stats),
            method=method,
            block=block,
            depth=depth,
            protocol=protocol,
            low_ms=tuple(s.low_ms or s.milliseconds for s in stats),
            high_ms=tuple(s.high_ms or s.milliseconds for s in stats),
            p90_ms=tuple(s.p90_ms or s.milliseconds for s in stats),
            faults=tuple(s.faults for s in stats if s.faults is not None),
            drift=timer.drift(),
        )

    return build


def search_counts(
    timer: InterleavedTimer[int],
    build: BuildProfile,
    counts: Sequence[int] | None,
    lowest: int,
    dense_tokens: int,
    time_limit: float | None,
    on_step: OnStep,
    batch_size: int = 1,
    possible: Sequence[int] | None = None,
) -> LatencyProfile:
    """Measures a coarse grid, then cliffs, then more rounds until the figures are precise or the time is up.

    Args:
        timer: Measures a token count; the time limit is on its clock.
        build: Makes a profile of the counts measured so far.
        counts: Counts to measure instead of a grid, or None.
        lowest: Smallest possible count.
        dense_tokens: N.
        time_limit: Seconds, or None for 20 rounds. A few rounds over `counts`, or over a few counts of the grid, are
            completed even after the limit.
        on_step: Called after every run.
        batch_size: Images in a batch, from which the counts follow at which tiles may end.
        possible: The counts below N that the method can leave; None if it can leave every one from `lowest` on.
    """
    start = timer.clock()
    deadline = start + time_limit if time_limit is not None else float("inf")
    timer.measure([], 2, start + 0.05 * time_limit if time_limit is not None else deadline, on_step)
    dense_seconds = timer.pace * timer.result(dense_tokens).milliseconds / 1e3
    if counts is not None:
        grid = sorted({*counts, dense_tokens})
    else:
        points = _affordable_grid(dense_seconds, time_limit)
        grid = nearest_possible(coarse_grid(lowest, dense_tokens, points, batch_size), possible)
    if time_limit is None:
        timer.measure(grid, _GRID.unlimited_rounds, on_step=on_step)
        return build(timer, grid)
    finest = nearest_possible(coarse_grid(lowest, dense_tokens, _GRID.max_counts, batch_size), possible)
    complete = counts is not None or grid == finest
    if counts is None:
        planned, grid = grid, _warmed_up(timer, grid, dense_tokens, deadline, on_step)
        complete = complete and grid == planned
    timer.measure(grid, _GRID.rounds, deadline, on_step, min_rounds=_GRID.required_rounds)
    profile = build(timer, grid)
    search = CliffSearch(frozenset(grid), open=counts is None and possible is None)
    first_run = timer.pace * median(timer.warm_up(count) for count in grid)
    while timer.clock() < deadline:
        left = deadline - timer.clock()
        # A new count is run once, and then in rounds together with its two neighbours.
        may_refine = left > _CLIFFS.refinement_of_time * time_limit
        affordable = int((left - dense_seconds) / (first_run + 3 * dense_seconds)) if may_refine else 0
        new = search.next_counts(profile, affordable)
        imprecise = [count for count in imprecise_counts(profile) if count not in new]
        if new:
            # Together with the neighbours, so that their difference does not contain changes between rounds.
            adjacent = {neighbour for count in new for neighbour in neighbours(profile.tokens, count)}
            grid = sorted({*grid, *new})
            timer.measure(sorted({*new, *adjacent}), _GRID.rounds, deadline, on_step)
        elif not imprecise:
            return replace(profile, converged=complete and not search.truncated)
        elif not timer.measure(imprecise, _GRID.extra_rounds, deadline, on_step):
            break
        profile = build(timer, grid)
    return profile


def _warmed_up(
    timer: InterleavedTimer[int], grid: Sequence[int], dense_tokens: int, deadline: float, on_step: OnStep
) -> list[int]:
    """Warms up the counts of the grid and returns them; only some, evenly spread, if time is too short for rounds.

    The first run of a model that is compiled for each count takes seconds, and so may any run of a large model.
    """
    dense_seconds = timer.pace * timer.result(dense_tokens).milliseconds / 1e3
    chosen, rest = [dense_tokens], set(grid) - {dense_tokens}
    while rest:
        needed = timer.pace * timer.warm_up(chosen[-1]) + _GRID.required_rounds * (len(chosen) + 1) * dense_seconds
        if len(chosen) > _GRID.required_counts and timer.clock() + needed > deadline:
            break
        count = max(sorted(rest), key=lambda candidate: min(abs(candidate - other) for other in chosen))
        timer.warm_up(count)
        on_step()
        chosen.append(count)
        rest.remove(count)
    return sorted(chosen)


def coarse_grid(lowest: int, dense_tokens: int, points: int, batch_size: int) -> list[int]:
    """Evenly spread counts from dense down to a tenth of the tokens.

    The counts lie where the rows of the batch fill a tile, if the tile size is a power of two: a cliff is then just
    above a count of the grid, where the search looks first.

    Args:
        lowest: Smallest possible count.
        dense_tokens: N.
        points: Approximate number of counts.
        batch_size: Images in a batch.

    Example:
        >>> from lightning_prune.profiling.count_search import coarse_grid
        >>> coarse_grid(lowest=3, dense_tokens=197, points=6, batch_size=1)
        [32, 64, 96, 128, 160, 192, 196, 197]
    """
    lowest = min(max(lowest, ceil(dense_tokens * _GRID.min_tokens_of_dense)), dense_tokens)
    rows = 2 ** round(np.log2(max(batch_size * (dense_tokens - lowest) / points, 1)))
    aligned = (rows * tile // batch_size for tile in range(batch_size * dense_tokens // rows + 1))
    first = max(dense_tokens - 1, lowest)  # the overhead of a cut, which a wide step from dense would hide
    return sorted({dense_tokens, first, *(count for count in aligned if lowest <= count <= dense_tokens)})


def nearest_possible(grid: Sequence[int], possible: Sequence[int] | None) -> list[int]:
    """The possible counts that are nearest to those of a grid, without repetition; the last of the grid is dense.

    Args:
        grid: Ascending.
        possible: The counts below the last one that a method can leave; None if it can leave every one.

    Example:
        >>> from lightning_prune.profiling.count_search import nearest_possible
        >>> nearest_possible([32, 64, 96, 196, 197], possible=[37, 50, 65, 101])
        [37, 65, 101, 197]
    """
    if possible is None or not possible:
        return list(grid) if possible is None else [grid[-1]]
    return sorted({min(possible, key=lambda other: abs(other - count)) for count in grid[:-1]} | {grid[-1]})


def _affordable_grid(dense_seconds: float, time_limit: float | None) -> int:
    """Number of counts of the coarse grid for which its rounds take about half of the time."""
    if time_limit is None:
        return _GRID.max_counts
    run = _GRID.pruned_run_of_dense * dense_seconds
    affordable = int(_GRID.share_of_time * time_limit / (run * (_GRID.rounds + 1)))
    return max(_GRID.min_counts, min(_GRID.max_counts, affordable))


@dataclass
class CliffSearch:
    """Chooses the token counts to measure next, until no step may contain an unseen cliff.

    Attributes:
        grid: The coarse grid, which lies where tiles may end.
        open: Whether there is anything left to search.
        truncated: Whether the search ended for lack of time.
        hit_balance: Cliffs found just above a count of the grid, minus the misses there.
        pending: Counts of the grid above which a count was measured and is not judged yet.
    """

    grid: frozenset[int]
    open: bool
    truncated: bool = False
    hit_balance: int = 0
    pending: set[int] = field(default_factory=set)

    def next_counts(self, profile: LatencyProfile, affordable: int) -> list[int]:
        """Counts to measure; none where no step hides a cliff or nothing more may be measured.

        Args:
            profile: What was measured so far.
            affordable: Number of counts that there is time for.
        """
        if not self.open:
            return []
        for below in sorted(self.pending):
            self._judge(profile, below)
        wide = [step for step in profile.steps() if step.above - step.below > 1]
        hiding = [step for step in wide if hides_cliff(profile, step) is not False]
        room = min(_CLIFFS.steps_at_once, _CLIFFS.max_counts - len(profile.tokens), affordable)
        self.truncated = bool(hiding) and affordable < 1
        self.open = bool(hiding) and room > 0
        largest = sorted(hiding, key=lambda step: step.saved, reverse=True)[: max(room, 0)]
        return [self._count_within(step) for step in largest if hides_cliff(profile, step)]

    def _count_within(self, step: CountStep) -> int:
        """The middle of a step, or just above its lower end where cliffs were found there."""
        unproven = self.hit_balance < 0 or (self.hit_balance == 0 and bool(self.pending))
        if unproven or not {step.above, step.below} <= self.grid:
            return (step.above + step.below) // 2
        self.pending.add(step.below)
        return step.below + 1

    def _judge(self, profile: LatencyProfile, below: int) -> None:
        """Counts a hit if the token just above `below` has most of the saving of the step that it was part of."""
        step = next(s for s in profile.steps() if s.below == below)
        if step.above == below + 1:
            self.hit_balance += 1 if step.saved > _CLIFFS.min_drop * profile.dense_ms else -1
            self.pending.discard(below)


def hides_cliff(profile: LatencyProfile, step: CountStep) -> bool | None:
    """Whether a step may contain a cliff, that is, all of its saving at a single token; None if noise leaves this open.

    After many rounds an open case counts as True: a needless count costs less than a missed cliff.
    """
    excess, noise = step.saved - _CLIFFS.min_drop * profile.dense_ms, profile.step_stderr(step)
    decisive = min(_rounds(profile, step)) >= _CLIFFS.decisive_rounds
    if excess < -_CLIFFS.confidence_sigmas * noise:
        return False
    return True if decisive or excess > noise else None


def _rounds(profile: LatencyProfile, step: CountStep) -> tuple[int, int]:
    """Number of measurements at the two ends of a step."""
    return profile.rounds[profile.tokens.index(step.above)], profile.rounds[profile.tokens.index(step.below)]


def imprecise_counts(profile: LatencyProfile) -> list[int]:
    """Counts that need more rounds: those with a large standard error, and the ends of undecided steps."""
    imprecise = {count for count in profile.tokens if profile.stderr_ms(count) > _CLIFFS.precision * profile.dense_ms}
    cliffs = profile.cliffs()
    for step in profile.steps():
        if step in cliffs and min(_rounds(profile, step)) < _CLIFFS.decisive_rounds:
            undecided = True  # in few rounds it may be chance
        elif step.above - step.below > 1:
            undecided = hides_cliff(profile, step) is None
        else:
            threshold = profile.significance * profile.step_stderr(step)
            noisy = threshold > _CLIFFS.undecided_noise_of_drop * _CLIFFS.min_drop * profile.dense_ms
            undecided = noisy and abs(profile.step_excess(step) - threshold) < threshold
        if undecided:
            imprecise |= {step.above, step.below}
    return sorted(c for c in imprecise if profile.rounds[profile.tokens.index(c)] < _CLIFFS.max_rounds)


def neighbours(tokens: Sequence[int], count: int) -> list[int]:
    """The measured counts next to one that is not measured yet."""
    place = int(np.searchsorted(tokens, count))
    return list(tokens[max(place - 1, 0) : place + 1])
