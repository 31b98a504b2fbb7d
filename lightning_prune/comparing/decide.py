"""Deciding every variant of a comparison: the schedule that reaches each target, timed beside all the others."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime

from torch import Tensor

from lightning_prune.comparing.auto import AutoReach
from lightning_prune.comparing.entries import Entry
from lightning_prune.comparing.joules import with_energy
from lightning_prune.comparing.planned import Decided, Planned, Unreached
from lightning_prune.comparing.reach import MethodReach, Reach
from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching import VisionTransformer
from lightning_prune.planning.block_search import BlockSearch
from lightning_prune.planning.goals import Goal
from lightning_prune.planning.targets import verify
from lightning_prune.profiling import DENSE, measurement_context
from lightning_prune.profiling.latency import check_dense, count_tokens, ready_to_run
from lightning_prune.profiling.variant import race_of
from lightning_prune.progress import ticking

_ROUNDS = 51  # of the run of all variants


def decide(
    transformer: VisionTransformer,
    images: Tensor,
    entries: Sequence[Entry],
    speedups: Sequence[float],
    *,
    block: int | float,
    max_seconds: float,
    progress: bool = True,
    searching: Callable[[], BlockSearch] | None = None,
) -> Decided:
    """Finds the schedule with which each method reaches each target, and times all variants in one interleaved run.

    Args:
        transformer: The Vision Transformer, dense.
        images: (B, channels, height, width) on its device.
        entries: What is compared, dense first.
        speedups: The targets, ascending.
        block: The reducing block of methods that reduce once; see `lightning_prune.profile_latency`.
        max_seconds: Time limit of the search, for each method; the final run gets as much again.
        progress: Shows bars on a terminal.
        searching: What `auto` searches with; needed where it is among the entries.

    Raises:
        UnsupportedModelError: If no method can be used with this model; says why for each.
    """
    start, started = time.perf_counter(), datetime.now().astimezone().isoformat(timespec="seconds")
    check_dense(transformer)
    with ready_to_run(transformer):
        n = count_tokens(transformer, images)
        reaches = {e.name: _reach_of(transformer, e, n, block, searching) for e in entries[1:]}
        unusable = {name: reach.why_not(images) for name, reach in reaches.items()}
        context = measurement_context(transformer.runner, images)
        usable = [entry for entry in entries[1:] if unusable[entry.name] is None]
        if not usable:
            reasons = "; ".join(f"{name}: {why}" for name, why in unusable.items())
            raise UnsupportedModelError(f"None of the methods can be used with this model. {reasons}")
        goals: dict[tuple[str, float], Goal] = {}
        planned = [entry for entry in usable if entry.has_targets]
        for number, entry in enumerate(planned, 1):
            reaches[entry.name].prepare(speedups)
            told = f"Planning {entry.name} ({number} of {len(planned)})"
            with race_of(transformer, images) as race, ticking(told, max_seconds, progress) as tick:
                found = reaches[entry.name].goals(race, speedups, max_seconds, tick)
            goals |= {(entry.name, goal.speedup): goal for goal in found}
        others = [DENSE, *(reaches[entry.name].variant_of(0) for entry in usable if not entry.has_targets)]
        limit = max_seconds * len(usable)
        with race_of(transformer, images) as race, ticking("Timing all variants", limit, progress) as tick:
            verify(race, list(goals.values()), others, _ROUNDS, limit, tick)
            timings = {variant: race.result(variant) for variant in (*others, *(g.variant for g in goals.values()))}
    rows: list[Planned] = [Planned("dense", "dense", timing=timings[DENSE])]
    unreached: list[Unreached] = []
    for entry in entries[1:]:
        reach = reaches[entry.name]
        if unusable[entry.name] is not None:
            rows.append(reach.row(None, None, unusable[entry.name] or ""))
        elif not entry.has_targets:
            rows.append(reach.row(None, timings[reach.variant_of(0)], reach.remark))
        for speedup in speedups if unusable[entry.name] is None and entry.has_targets else ():
            goal = goals[entry.name, speedup]
            if goal.unreachable:
                unreached.append(reach.unreached(goal))
            else:
                rows.append(reach.row(goal, timings[goal.variant], "", context))
    with ready_to_run(transformer):
        rows, energy = with_energy(transformer, images, rows, {entry.name: entry for entry in entries}, progress)
    return Decided(rows, unreached, context, n, energy, time.perf_counter() - start, started)


def _reach_of(
    transformer: VisionTransformer,
    entry: Entry,
    tokens: int,
    block: int | float,
    searching: Callable[[], BlockSearch] | None,
) -> Reach:
    if not entry.searches:
        return MethodReach(transformer, entry, tokens, block)
    assert searching is not None  # whoever reads `auto` in the methods provides it
    return AutoReach(transformer, entry, tokens, searching)
