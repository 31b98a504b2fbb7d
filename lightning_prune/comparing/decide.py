"""Deciding every variant of a comparison: the schedule that reaches each target, timed beside all the others."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from torch import Tensor

from lightning_prune.comparing.entries import Entry
from lightning_prune.comparing.joules import with_energy
from lightning_prune.comparing.planned import Decided, Planned, Unreached
from lightning_prune.errors import ScheduleError, UnsupportedModelError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.planning.goals import Goal
from lightning_prune.planning.targets import aim, search, verify
from lightning_prune.profiling import DENSE, Interleaved, Timing, Variant, measurement_context
from lightning_prune.profiling.latency import check_dense, count_tokens, ready_to_run
from lightning_prune.profiling.spreading import reducing_block, spread_schedule
from lightning_prune.profiling.variant import race_of
from lightning_prune.progress import ticking
from lightning_prune.quantization import int8_backend, int8_unavailable
from lightning_prune.schedule import Schedule

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

    Raises:
        UnsupportedModelError: If no method can be used with this model; says why for each.
    """
    start, started = time.perf_counter(), datetime.now().astimezone().isoformat(timespec="seconds")
    check_dense(transformer)
    with ready_to_run(transformer):
        n = count_tokens(transformer, images)
        reaches = {e.name: _Reach(transformer, e, n, block) for e in entries[1:]}
        unusable = {name: reach.why_not(images) for name, reach in reaches.items()}
        context = measurement_context(transformer.runner, images)
        usable = [entry for entry in entries[1:] if unusable[entry.name] is None]
        if not usable:
            reasons = "; ".join(f"{name}: {why}" for name, why in unusable.items())
            raise UnsupportedModelError(f"None of the methods can be used with this model. {reasons}")
        goals: dict[tuple[str, float], Goal] = {}
        planned = [entry for entry in usable if entry.has_targets]
        for number, entry in enumerate(planned, 1):
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
                unreached.append(_unreached(entry.name, goal))
            else:
                rows.append(reach.row(goal, timings[goal.variant], "", context))
    with ready_to_run(transformer):
        rows, energy = with_energy(transformer, images, rows, {entry.name: entry for entry in entries}, progress)
    return Decided(rows, unreached, context, n, energy, time.perf_counter() - start, started)


class _Reach:
    """What one method can do for one model."""

    def __init__(self, transformer: VisionTransformer, entry: Entry, tokens: int, block: int | float) -> None:
        self.transformer, self.entry, self.n = transformer, entry, tokens
        self.prefix, self.depth = transformer.prefix_tokens, transformer.depth
        reduction = entry.reduction
        self.block = 0 if reduction is None else reducing_block(reduction, block, transformer)
        self.most = 0
        if reduction is not None and not reduction.adaptive:
            self.most = reduction.most(self.n, self.prefix, self.depth, self.block)
        self.remark = "the images decide how many tokens go" if reduction is not None and reduction.adaptive else ""

    def schedule_of(self, amount: int) -> Schedule | None:
        """What removes so many tokens; None where nothing is removed, or the images decide."""
        reduction = self.entry.reduction
        if reduction is None or reduction.adaptive or not amount:
            return None
        return spread_schedule(reduction, amount, self.n, self.prefix, self.depth, self.block)

    def variant_of(self, amount: int) -> Variant:
        """The variant that removes so many tokens."""
        reduction, schedule = self.entry.reduction, self.schedule_of(amount)
        adaptive = reduction is not None and reduction.adaptive
        return Variant(reduction if adaptive or schedule is not None else None, schedule, self.entry.int8)

    def why_not(self, images: Tensor) -> str | None:
        """Why the method cannot be used with this model on this device; None where it can."""
        root, reduction = self.transformer.root, self.entry.reduction
        if self.entry.int8:
            why = int8_unavailable(images.device, root, images)
            if why is not None:
                return why
            self.remark = "; ".join(filter(None, (self.remark, f"8 bits by {int8_backend(images.device)}")))
        if reduction is None:
            return None
        try:
            if not reduction.adaptive and self.most < 1:
                return f"{reduction.name} can remove none of the {self.n} tokens"
            with PatchHandle(self.transformer, reduction, self.schedule_of(1)):
                root.forward(images)  # past a compiled graph: this is about whether it runs, not how fast
        except (UnsupportedModelError, ScheduleError) as error:
            return str(error)
        return None

    def goals(
        self, race: Interleaved[Variant], speedups: Sequence[float], max_seconds: float, tick: Callable[[], None]
    ) -> list[Goal]:
        """The amounts that the latency curve suggests for the targets."""
        least = 0 if self.entry.int8 else 1
        found = search(race, self.variant_of, least, self.most, speedups, max_seconds / 2, tick)
        start = {speedup: self.most if amount is None else amount for speedup, amount in found.amounts.items()}
        goals = [Goal(self.variant_of, speedup, start[speedup], least, self.most) for speedup in speedups]
        aim(race, goals, max_seconds / 2, tick)
        return goals

    def row(
        self, goal: Goal | None, timing: Timing | None, note: str, context: Mapping[str, Any] | None = None
    ) -> Planned:
        """The variant that came of a goal, or the only one of a method without goals."""
        entry, reduction = self.entry, self.entry.reduction
        name = entry.name if goal is None else f"{entry.name} {goal.speedup:g}x"
        settings = {} if reduction is None else {key: _plain(value) for key, value in reduction.settings().items()}
        schedule = None
        if goal is not None:
            counts = self.schedule_of(goal.amount) or Schedule([0] * self.depth)
            origin = {
                "method": entry.method,
                "int8": entry.int8,
                "settings": settings,
                "target_speedup": goal.speedup,
                "tokens_dense": self.n,
                "tokens": self.n - goal.amount,
            }
            schedule = Schedule(counts.removed, origin | dict(context or {}))
            note = _shortfall(goal, timing)
        return Planned(
            variant=name,
            entry=entry.name,
            method=entry.method,
            int8=entry.int8,
            target=None if goal is None else goal.speedup,
            settings=settings,
            schedule=schedule,
            timing=timing,
            note=note,
        )


def _shortfall(goal: Goal, timing: Timing | None) -> str:
    if not goal.amount:
        return "8 bits alone reach it"
    if goal.reached or timing is None:
        return ""
    return f"short of its target: {1 / timing.ratio:.2f}x when planning ended"


def _unreached(name: str, goal: Goal) -> Unreached:
    return Unreached(name, goal.speedup, goal.best, f"timed up to {goal.most} removed tokens, the most that it can")


def _plain(value: Any) -> Any:
    """Settings as a file can hold them."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
