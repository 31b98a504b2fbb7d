"""Searching for the schedule of each method at each target speed-up."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from torch import Tensor

from lightning_prune._utils.progress import progress_bar
from lightning_prune.comparison.variants import (
    ComparisonPlan,
    PlannedVariant,
    UnreachedTarget,
    VariantRequest,
    variant_of,
)
from lightning_prune.errors import ArgumentError, DataError, ScheduleError, UnsupportedModelError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.patching.schedule_forms import allocate_schedule, reducing_block
from lightning_prune.planning.api import usable_methods
from lightning_prune.planning.candidates import ParetoPoint, decided, ladder
from lightning_prune.planning.multi_block import BlockSearch
from lightning_prune.planning.objectives import LatencyBudget
from lightning_prune.planning.speedup_targets import NEAR, SpeedupTarget, aim, search, verify
from lightning_prune.profiling import DENSE, InterleavedTimer, LatencyStats, Variant, VariantSwitch, measurement_context
from lightning_prune.profiling.energy_meter import NO_COUNTER, Unavailable, find_counter, measure_energy
from lightning_prune.profiling.measurement import check_dense, count_tokens, ready_to_run
from lightning_prune.profiling.model_variants import variant_timer
from lightning_prune.quantization import Int8Weights, int8_backend, int8_unavailable
from lightning_prune.reduction import Reduction, spec_of
from lightning_prune.schedule import MeasurementSource, Schedule


class Reach(ABC):
    """What one entry of a comparison can do for one model.

    Args:
        transformer: The Vision Transformer, dense.
        entry: The method.
        tokens: N.

    Attributes:
        remark: What is to be said of its row, where it has no targets.
    """

    def __init__(self, transformer: VisionTransformer, entry: VariantRequest, tokens: int) -> None:
        self.transformer, self.entry, self.n = transformer, entry, tokens
        self.depth = transformer.depth
        self.remark = ""

    @abstractmethod
    def why_not(self, images: Tensor) -> str | None:
        """Why the method cannot be used with this model on this device; None where it can."""

    def prepare(self, speedups: Sequence[float]) -> None:  # noqa: B027  nothing, for most
        """Measures what must be known before `goals` can be asked for."""

    @abstractmethod
    def goals(
        self, race: InterleavedTimer[Variant], speedups: Sequence[float], time_limit: float, tick: Callable[[], None]
    ) -> list[SpeedupTarget]:
        """What to try first for each of the targets."""

    @abstractmethod
    def variant_of(self, amount: int) -> Variant:
        """The variant that removes so much."""

    def reduction_of(self, goal: SpeedupTarget | None) -> Reduction | None:
        """The method behind a goal."""
        return self.entry.reduction

    def unreached(self, goal: SpeedupTarget) -> UnreachedTarget:
        """Why a goal is not reached."""
        most = f"timed up to {goal.most} removed tokens, the most that it can"
        return UnreachedTarget(self.entry.name, goal.speedup, goal.best, most)

    def row(
        self,
        goal: SpeedupTarget | None,
        timing: LatencyStats | None,
        note: str,
        context: Mapping[str, Any] | None = None,
    ) -> PlannedVariant:
        """The variant that came of a goal, or the only one of a method without goals."""
        entry, reduction = self.entry, self.reduction_of(goal)
        name = entry.name if goal is None else f"{entry.name} {goal.speedup:g}x"
        settings = {} if reduction is None else {key: _plain(value) for key, value in reduction.settings().items()}
        chosen = "" if reduction is None or reduction is entry.reduction else reduction.name
        schedule = None
        if goal is not None:
            given = goal.variant.schedule
            counts = given if isinstance(given, Schedule) else Schedule([0] * self.depth)
            made_on = MeasurementSource.from_context(
                context or {}, dense_tokens=self.n, int8=entry.int8, target_speedup=goal.speedup
            )
            schedule = Schedule(counts.removed, None if reduction is None else spec_of(reduction), made_on)
            note = "; ".join(filter(None, (chosen, _shortfall(goal, timing))))
        return PlannedVariant(
            variant=name,
            request=entry.name,
            method=entry.method,
            int8=entry.int8,
            chosen=chosen,
            target_speedup=None if goal is None else goal.speedup,
            settings=settings,
            schedule=schedule,
            timing=timing,
            note=note,
        )


class MethodReach(Reach):
    """What a reduction, or 8 bits, can do: amounts are tokens that it removes.

    Args:
        transformer: The Vision Transformer, dense.
        entry: The method.
        tokens: N.
        block: The reducing block of methods that reduce once.
    """

    def __init__(self, transformer: VisionTransformer, entry: VariantRequest, tokens: int, block: int | float) -> None:
        super().__init__(transformer, entry, tokens)
        self.prefix = transformer.prefix_tokens
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
        return allocate_schedule(reduction, amount, self.n, self.prefix, self.depth, self.block)

    def variant_of(self, amount: int) -> Variant:
        """The variant that removes so many tokens."""
        reduction, schedule = self.entry.reduction, self.schedule_of(amount)
        adaptive = reduction is not None and reduction.adaptive
        weights = Int8Weights if self.entry.int8 else None
        return Variant(reduction if adaptive or schedule is not None else None, schedule, weights)

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
        self, race: InterleavedTimer[Variant], speedups: Sequence[float], time_limit: float, tick: Callable[[], None]
    ) -> list[SpeedupTarget]:
        """The amounts that the latency curve suggests for the targets."""
        least = 0 if self.entry.int8 else 1
        found = search(race, self.variant_of, least, self.most, speedups, time_limit / 2, tick)
        start = {speedup: self.most if amount is None else amount for speedup, amount in found.amounts.items()}
        goals = [SpeedupTarget(self.variant_of, speedup, start[speedup], least, self.most) for speedup in speedups]
        aim(race, goals, time_limit / 2, tick)
        return goals


def _shortfall(goal: SpeedupTarget, timing: LatencyStats | None) -> str:
    if not goal.amount:
        return "8 bits alone reach it"
    if goal.reached or timing is None:
        return ""
    return f"short of its target: {1 / timing.ratio:.2f}x when planning ended"


def _plain(value: Any) -> Any:
    """Settings as a file can hold them."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


class AutoSearch(Reach):
    """What `auto` can do: for each target the best schedule of the best method.

    Amounts are steps of one ladder of all methods, so that a target that is missed, or reached with room to spare, is
    led to what is best there, by whatever method.

    Args:
        transformer: The Vision Transformer, dense.
        entry: `auto`.
        tokens: N.
        searching: Makes what it searches with; called once, if it comes to that.
    """

    def __init__(
        self, transformer: VisionTransformer, entry: VariantRequest, tokens: int, searching: Callable[[], BlockSearch]
    ) -> None:
        super().__init__(transformer, entry, tokens)
        self._searching = searching
        self._ladder: list[ParetoPoint] = []
        self._first: dict[float, int] = {}  # target -> the step to try first

    def why_not(self, images: Tensor) -> str | None:
        """Why none of the methods that are searched can be used; None where one can."""
        try:
            usable_methods(self.entry.searched, self.transformer)
        except UnsupportedModelError as error:
            return str(error)
        return None

    def prepare(self, speedups: Sequence[float]) -> None:
        """Measures prices and sensitivities, and chooses a schedule for each target."""
        search = self._searching()
        fronts = search.fronts(usable_methods(self.entry.searched, self.transformer))
        chosen = {}
        for speedup in speedups:
            try:
                chosen[speedup] = decided(search, fronts, LatencyBudget(speedup=speedup))
            except ArgumentError:  # none is predicted to reach it: let the fastest try
                continue
        self._ladder = ladder(fronts, chosen.values())
        for speedup in speedups:
            own = chosen.get(speedup)
            steps = [step for step, rung in enumerate(self._ladder, 1) if own is not None and rung.entry is own.entry]
            near = [step for step, rung in enumerate(self._ladder, 1) if rung.ratio <= (1 + NEAR) / speedup]
            self._first[speedup] = next(iter(steps or near), len(self._ladder))

    def goals(
        self, race: InterleavedTimer[Variant], speedups: Sequence[float], time_limit: float, tick: Callable[[], None]
    ) -> list[SpeedupTarget]:
        """Beginning with what was chosen."""
        most = len(self._ladder)
        goals = [
            SpeedupTarget(self.variant_of, speedup, self._first[speedup], min(1, most), most) for speedup in speedups
        ]
        aim(race, goals, time_limit, tick)
        return goals

    def variant_of(self, amount: int) -> Variant:
        """The step of the ladder; 0 is dense."""
        if not amount:
            return DENSE
        rung = self._ladder[amount - 1]
        return Variant(rung.front.reduction, rung.entry.schedule)

    def reduction_of(self, goal: SpeedupTarget | None) -> Reduction | None:
        """The method of the step that a goal has come to; None where it removes nothing."""
        return self._ladder[goal.amount - 1].front.reduction if goal is not None and goal.amount else None

    def unreached(self, goal: SpeedupTarget) -> UnreachedTarget:
        """The fastest schedule missed the target."""
        most = f"timed up to {goal.variant_of(goal.most).schedule}"
        return UnreachedTarget(self.entry.name, goal.speedup, goal.best, most)


def with_energy(
    transformer: VisionTransformer,
    images: Tensor,
    rows: Sequence[PlannedVariant],
    entries: Mapping[str, VariantRequest],
    progress: bool = True,
) -> tuple[list[PlannedVariant], str]:
    """Measures what an image costs as each variant, in windows of a second or more.

    To be used inside `ready_to_run`.

    Args:
        transformer: The Vision Transformer, dense; so it is afterwards.
        images: (B, channels, height, width) on its device.
        rows: The variants.
        entries: Name -> entry.
        progress: Shows a bar on a terminal.

    Returns:
        The variants with their energy, and where that comes from; as they were, and why, where there is no counter.
    """
    counter = find_counter(images.device)
    if isinstance(counter, Unavailable):
        return list(rows), counter.text
    switch, found, idle = VariantSwitch(transformer), [], 0.0
    try:
        with progress_bar("Measuring energy", None, progress) as tick:
            for row in rows:
                if row.timing is not None:
                    switch.to(variant_of(row, entries[row.request]))
                    reading = measure_energy(lambda: transformer.runner(images), len(images), images.device, counter)
                    row = replace(row, joules_per_image=reading.joules_per_image, watts=reading.watts)
                    idle = reading.idle_watts
                    tick()
                found.append(row)
    except DataError as error:  # the counter stands still under load: what it says is no energy
        return list(rows), f"{NO_COUNTER}: {error}"
    finally:
        switch.off()
    return found, f"{counter.name}; the idle device draws {idle:.1f} W"


_ROUNDS = 51  # of the run of all variants


def decide(
    transformer: VisionTransformer,
    images: Tensor,
    entries: Sequence[VariantRequest],
    speedups: Sequence[float],
    *,
    block: int | float,
    time_limit: float,
    progress: bool = True,
    searching: Callable[[], BlockSearch] | None = None,
) -> ComparisonPlan:
    """Finds the schedule with which each method reaches each target, and times all variants in one interleaved run.

    Args:
        transformer: The Vision Transformer, dense.
        images: (B, channels, height, width) on its device.
        entries: What is compared, dense first.
        speedups: The targets, ascending.
        block: The reducing block of methods that reduce once; see `lightning_prune.profile_latency`.
        time_limit: Time limit of the search, for each method; the final run gets as much again.
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
        goals: dict[tuple[str, float], SpeedupTarget] = {}
        planned = [entry for entry in usable if entry.has_targets]
        for number, entry in enumerate(planned, 1):
            reaches[entry.name].prepare(speedups)
            told = f"Planning {entry.name} ({number} of {len(planned)})"
            with variant_timer(transformer, images) as race, progress_bar(told, time_limit, progress) as tick:
                found = reaches[entry.name].goals(race, speedups, time_limit, tick)
            goals |= {(entry.name, goal.speedup): goal for goal in found}
        others = [DENSE, *(reaches[entry.name].variant_of(0) for entry in usable if not entry.has_targets)]
        limit = time_limit * len(usable)
        with variant_timer(transformer, images) as race, progress_bar("Timing all variants", limit, progress) as tick:
            verify(race, list(goals.values()), others, _ROUNDS, limit, tick)
            timings = {variant: race.result(variant) for variant in (*others, *(g.variant for g in goals.values()))}
    rows: list[PlannedVariant] = [PlannedVariant("dense", "dense", timing=timings[DENSE])]
    unreached: list[UnreachedTarget] = []
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
    return ComparisonPlan(rows, unreached, context, n, energy, time.perf_counter() - start, started)


def _reach_of(
    transformer: VisionTransformer,
    entry: VariantRequest,
    tokens: int,
    block: int | float,
    searching: Callable[[], BlockSearch] | None,
) -> Reach:
    if not entry.searches:
        return MethodReach(transformer, entry, tokens, block)
    assert searching is not None  # whoever reads `auto` in the methods provides it
    return AutoSearch(transformer, entry, tokens, searching)
