"""The schedule with which each method reaches each target speed-up, timed together with all other variants."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from math import isfinite
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune._utils.progress import OnStep, progress_bar
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
from lightning_prune.planning.candidate_search import CandidateSearch, CandidateSource, Timings, run_searches
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.method_front import MethodFront
from lightning_prune.planning.method_selection import usable_methods
from lightning_prune.planning.objectives import RATIO_TOLERANCE, LatencyBudget
from lightning_prune.planning.ordered_candidates import TARGET_TUNING, OrderedCandidates, amount_grid
from lightning_prune.planning.results import Candidate, pareto_front
from lightning_prune.profiling import DENSE, InterleavedTimer, LatencyStats, Variant, VariantSwitch, measurement_context
from lightning_prune.profiling.energy_meter import NO_COUNTER, Unavailable, find_counter, measure_energy
from lightning_prune.profiling.measurement import check_dense, ready_to_run
from lightning_prune.profiling.model_variants import variant_timer
from lightning_prune.quantization import Int8Weights, int8_backend
from lightning_prune.quantization import unsupported_reason as int8_unsupported_reason
from lightning_prune.reduction import spec_of
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class MethodSearchTuning:
    """Constants of the search for target speed-ups.

    Attributes:
        grid_points: Fewest and most amounts of the first grid.
        grid_rounds: Rounds of the first grid.
        search_rounds: Rounds of each run of the search; what it finds is verified by many more.
        final_rounds: Rounds of the run of all variants.
        slow_ratio: A variant slower than this, over dense, is timed in fewer rounds, so that it leaves time for others.
    """

    grid_points: tuple[int, int] = (4, 16)
    grid_rounds: int = 3
    search_rounds: int = 9
    final_rounds: int = 51
    slow_ratio: float = 3.0


TUNING = MethodSearchTuning()


def check_speedups(speedups: Sequence[float]) -> list[float]:
    """The target speed-ups in ascending order.

    Args:
        speedups: Dense latency over wanted latency, each > 1.

    Raises:
        ArgumentError: If there is none, one is not a finite number > 1 (1 is the dense model), or one occurs twice.
    """
    if not isinstance(speedups, list | tuple) or not speedups:
        raise ArgumentError(f"`speedups` must be a list of numbers > 1, got {speedups!r}.")
    for value in speedups:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not isfinite(value) or value <= 1:
            raise ArgumentError(f"`speedups` must be finite numbers > 1 (1 is the dense model), got {value!r}.")
    names = [f"{value:g}" for value in speedups]  # as variants are called
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ArgumentError(f"`speedups` must differ from one another, got {repeated} twice.")
    return sorted(float(value) for value in speedups)


class VariantTimer:
    """Times candidates in rounds of one interleaved run.

    Args:
        timer: The interleaved timer; its reference is dense.
        rounds: Rounds of each candidate.
        deadline: On the timer's clock; one round is completed all the same.
        on_step: Called after every run.
    """

    def __init__(self, timer: InterleavedTimer[Variant], rounds: int, deadline: float, on_step: OnStep) -> None:
        self.timer, self.rounds, self.deadline, self.on_step = timer, rounds, deadline, on_step

    def time_variants(self, variants: Sequence[Variant]) -> None:
        """Times variants together with dense, slow ones in fewer rounds, in half of the time that is left."""
        start = self.timer.clock()
        self.timer.measure(variants, 1, on_step=self.on_step)
        slow = [v for v in variants if self.timer.result(v).ratio > TUNING.slow_ratio]
        fast = [v for v in variants if v not in slow]
        until = start + (self.deadline - start) / 10
        self.timer.measure(slow, min(self.rounds, TUNING.search_rounds) - 1, until, self.on_step)
        self.timer.measure(fast, self.rounds - 1, (self.timer.clock() + self.deadline) / 2, self.on_step)

    def __call__(self, candidates: Sequence[Candidate]) -> Timings:
        """Times candidates; their timings and that of dense."""
        self.time_variants([candidate.variant for candidate in candidates])
        return self.timer.result(DENSE), {c.key: self.timer.result(c.variant) for c in candidates}


def search_targets(
    timer: InterleavedTimer[Variant],
    source: OrderedCandidates,
    budgets: Sequence[LatencyBudget],
    time_limit: float,
    on_step: OnStep,
) -> dict[LatencyBudget, int]:
    """The smallest amount of a method that reaches each target, as short runs show; to be verified.

    Args:
        timer: Times variants; the time limit is on its clock.
        source: The amounts of the method. If it has no `start`, a grid over all amounts is timed first.
        budgets: The targets.
        time_limit: Seconds; one round is completed all the same.
        on_step: Called after every run.
    """
    deadline = timer.clock() + time_limit
    if not source.start:
        timer.measure([], 1, on_step=on_step)
        seconds = timer.result(DENSE).milliseconds / 1e3
        fewest, most = TUNING.grid_points
        points = int(0.5 * time_limit / (seconds * (TUNING.grid_rounds + 1)))
        amounts = amount_grid(source.smallest, source.largest, max(fewest, min(most, points)))
        grid = [source.candidate(amount) for amount in amounts]
        timer.measure([c.variant for c in grid], TUNING.grid_rounds, deadline, on_step)
        for candidate in grid:
            source.observe(candidate, timer.result(candidate.variant))
    searches = {budget: CandidateSearch(budget, [source], 1.0, tuning=TARGET_TUNING) for budget in budgets}
    timing = VariantTimer(timer, TUNING.search_rounds, deadline, on_step)
    run_searches(list(searches.values()), timing, deadline, clock=timer.clock)
    dense_ms = timer.result(DENSE).milliseconds
    return {budget: source.amount(source.propose(budget, dense_ms, deadline).candidate) for budget in budgets}


@dataclass
class Target:
    """A target speed-up of one method, with what was found for it.

    Attributes:
        budget: The target.
        source: The amounts of the method.
        search: The search of the final run.
        candidate: The candidate that reaches the target, or comes nearest.
        reached: Whether it does.
        exhausted: Whether the largest amount does not reach it.
        best_speedup: The largest speed-up that was timed.
    """

    budget: LatencyBudget
    source: OrderedCandidates
    search: CandidateSearch
    candidate: Candidate | None = None
    reached: bool = False
    exhausted: bool = False
    best_speedup: float = 0.0


def verify_targets(
    timer: InterleavedTimer[Variant],
    targets: Sequence[Target],
    others: Sequence[Variant],
    rounds: int,
    time_limit: float,
    on_step: OnStep,
) -> None:
    """Times all variants in one interleaved run; a target that is missed moves on to another amount.

    Args:
        timer: A fresh one: the timings of the search chose the amounts, and so speak too well of them.
        targets: Changed in place; their sources must be restarted.
        others: Variants without a target.
        rounds: Rounds of each variant, if time allows.
        time_limit: Seconds; one round is completed all the same.
        on_step: Called after every run.
    """
    deadline = timer.clock() + time_limit
    timing = VariantTimer(timer, rounds, deadline, on_step)
    untimed = list(others)

    def time_candidates(candidates: Sequence[Candidate]) -> Timings:
        timing.time_variants(list(dict.fromkeys([*untimed, *(candidate.variant for candidate in candidates)])))
        untimed.clear()
        return timer.result(DENSE), {c.key: timer.result(c.variant) for c in candidates}

    run_searches([target.search for target in targets], time_candidates, deadline, clock=timer.clock)
    if untimed:
        timing.time_variants(untimed)
    for target in targets:
        choice = target.search.result()
        target.candidate, target.reached = choice.candidate, choice.met
        fails = target.source.reaches(target.source.largest, target.budget, 1.0) is False
        target.exhausted = not choice.met and fails
        target.best_speedup = max(1 / timed.timing.ratio for timed in target.search.timed)


class _Method:
    """One method of a comparison: what it can do with one model.

    Args:
        transformer: The Vision Transformer, dense.
        entry: The method.
        tokens: N.
        block: The reducing block of methods that reduce once.
    """

    def __init__(self, transformer: VisionTransformer, entry: VariantRequest, tokens: int, block: int | float) -> None:
        self.transformer, self.entry, self.tokens = transformer, entry, tokens
        self.depth, self.prefix = transformer.depth, transformer.num_prefix_tokens
        self.note = ""
        self.weights = Int8Weights if entry.int8 else None
        reduction = entry.reduction
        self.block = 0 if reduction is None else reducing_block(reduction, block, transformer)
        self.largest = 0
        if reduction is not None and reduction.adaptive:
            self.note = "the images decide how many tokens go"
        elif reduction is not None:
            self.largest = reduction.max_total_removed(tokens, self.prefix, self.depth, self.block)

    def unsupported_reason(self, images: Tensor) -> str | None:
        """Why the method cannot be used with this model on this device; None if it can."""
        root, reduction = self.transformer.root, self.entry.reduction
        if self.entry.searches:
            try:
                usable_methods(list(self.entry.searched), "all", self.transformer)
            except UnsupportedModelError as error:
                return str(error)
            return None
        if self.entry.int8:
            reason = int8_unsupported_reason(images.device, root, images)
            if reason is not None:
                return reason
            self.note = "; ".join(filter(None, (self.note, f"8 bits by {int8_backend(images.device)}")))
        if reduction is None:
            return None
        try:
            if not reduction.adaptive and self.largest < 1:
                return f"{reduction.name} can remove none of the {self.tokens} tokens"
            schedule = None if reduction.adaptive else self._candidate(1).schedule
            with PatchHandle(self.transformer, reduction, schedule):
                root.forward(images)  # past a compiled graph: this is about whether it runs, not how fast
        except (UnsupportedModelError, ScheduleError) as error:
            return str(error)
        return None

    def variant(self) -> Variant:
        """The only variant of a method without targets."""
        return Variant(self.entry.reduction, None, self.weights)

    def source(self) -> OrderedCandidates:
        """The amounts of a method in its usual form: tokens that it removes."""
        return OrderedCandidates(self.entry.name, self._candidate, 0 if self.entry.int8 else 1, self.largest)

    def _candidate(self, amount: int) -> Candidate:
        reduction = self.entry.reduction
        assert reduction is not None
        counts = (self.tokens, self.prefix, self.depth, self.block)
        schedule = allocate_schedule(reduction, amount, *counts)
        return Candidate(self.entry.name, reduction, schedule, 1.0, weights=self.weights)

    def row(
        self, target: Target | None, timing: LatencyStats | None, note: str, context: Mapping[str, Any] | None = None
    ) -> PlannedVariant:
        """The variant of a target, or the only one of a method without targets."""
        entry, reduction, schedule, name = self.entry, self.entry.reduction, None, self.entry.name
        if target is not None and target.candidate is not None:
            name, reduction = f"{entry.name} {target.budget.speedup:g}x", target.candidate.reduction
        settings = {} if reduction is None else {key: _plain(value) for key, value in reduction.settings().items()}
        chosen = "" if reduction is None or reduction is entry.reduction else reduction.name
        if target is not None and target.candidate is not None:
            counts = target.candidate.schedule
            made_on = MeasurementSource.from_context(
                context or {}, dense_tokens=self.tokens, int8=entry.int8, target_speedup=target.budget.speedup
            )
            schedule = Schedule(counts.removed, None if reduction is None else spec_of(reduction), made_on)
            shortfall = ""
            if not counts.total_removed:
                shortfall = "8 bits alone reach it"
            elif not target.reached and timing is not None:
                shortfall = f"short of its target: {1 / timing.ratio:.2f}x when planning ended"
            note = "; ".join(filter(None, (chosen, shortfall)))
        return PlannedVariant(
            variant=name,
            request=entry.name,
            method=entry.method,
            int8=entry.int8,
            chosen=chosen,
            target_speedup=None if target is None else target.budget.speedup,
            settings=settings,
            schedule=schedule,
            timing=timing,
            note=note,
        )


def merged_front(fronts: Sequence[MethodFront], chosen: Sequence[Candidate]) -> list[Candidate]:
    """The candidates of all methods from the slowest to the fastest, none beaten in both latency and proxy.

    Args:
        fronts: Of the methods.
        chosen: Timed candidates with their proxies; no candidate that is merely predicted displaces one of them.
    """

    def key(candidate: Candidate) -> tuple[float, float]:
        return candidate.latency_ratio, -(candidate.accuracy or 0.0)

    def beats(one: Candidate, other: Candidate) -> bool:
        return all(a <= b for a, b in zip(key(one), key(other), strict=True))

    timed = pareto_front([candidate for candidate in chosen if not candidate.is_dense], key)
    predicted = [
        replace(candidate, accuracy=front.estimate(candidate))
        for front in fronts
        for candidate in front.candidates
        if not candidate.is_dense
    ]
    fitting = [c for c in predicted if not any(beats(c, other) or beats(other, c) for other in timed)]
    return pareto_front([*timed, *fitting], key)[::-1]


def auto_source(
    entry: VariantRequest, measured: Measurements, transformer: VisionTransformer, budgets: Sequence[LatencyBudget]
) -> OrderedCandidates:
    """The merged front of all methods, with the position from which each target starts.

    Args:
        entry: `auto`.
        measured: What planning measures.
        transformer: The Vision Transformer.
        budgets: The targets.
    """
    fronts = measured.fronts(usable_methods(list(entry.searched), "all", transformer))
    searches = [CandidateSearch(budget, fronts, measured.dense_ms, measured.proxy.name) for budget in budgets]
    limit = measured.limit
    run_searches(searches, measured.time_candidates, limit.deadline(), 0.6, limit.clock)
    choices = {search.objective: search.result() for search in searches}
    front = merged_front(fronts, [choice.candidate for choice in choices.values() if choice.candidate.timing])
    start = {}
    for budget in budgets:
        own = [p for p, c in enumerate(front, 1) if c.key == choices[budget].candidate.key and choices[budget].met]
        wanted = (1 + RATIO_TOLERANCE) * budget.limit_ms(1.0)
        near = [position for position, candidate in enumerate(front, 1) if candidate.latency_ratio <= wanted]
        start[budget] = next(iter(own or near), len(front))
    dense = Candidate(entry.name, None, Schedule([0] * transformer.depth), 1.0)

    def candidate_of(position: int) -> Candidate:
        return dense if not position else replace(front[position - 1], timing=None)

    return OrderedCandidates(entry.name, candidate_of, min(1, len(front)), len(front), start)


def search_methods(
    transformer: VisionTransformer,
    images: Tensor,
    entries: Sequence[VariantRequest],
    speedups: Sequence[float],
    *,
    block: int | float,
    time_limit: float,
    verbose: bool = True,
    planner: Callable[[], Measurements] | None = None,
    fixed: Mapping[str, PlannedVariant] = MappingProxyType({}),
) -> ComparisonPlan:
    """Finds the schedule with which each method reaches each target, and times all variants in one interleaved run.

    Args:
        transformer: The Vision Transformer, dense.
        images: (B, C, H, W) on its device.
        entries: The methods, dense first.
        speedups: The targets, ascending.
        block: The reducing block of methods that reduce once; see `lightning_prune.profile_latency`.
        time_limit: Seconds for each method; the final run gets as much for all.
        verbose: Shows progress bars on a terminal.
        planner: Makes what `auto` plans with; needed if it is among the methods.
        fixed: Request -> its variant, where its schedule is known: it is only timed.

    Raises:
        UnsupportedModelError: If no method can be used with this model; says why for each.
    """
    start, started = time.perf_counter(), datetime.now().astimezone().isoformat(timespec="seconds")
    check_dense(transformer)
    budgets = [LatencyBudget(speedup=speedup) for speedup in speedups]
    with ready_to_run(transformer):
        n = transformer.count_tokens(images)
        searched = [entry for entry in entries[1:] if entry.name not in fixed]
        methods = {entry.name: _Method(transformer, entry, n, block) for entry in searched}
        unusable = {name: method.unsupported_reason(images) for name, method in methods.items()}
        context = measurement_context(transformer.compiled_root, images)
        usable = [entry for entry in searched if unusable[entry.name] is None]
        if not usable and not fixed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in unusable.items())
            raise UnsupportedModelError(f"None of the methods can be used with this model. {reasons}")
        targets: dict[tuple[str, float], Target] = {}
        planned = [entry for entry in usable if entry.has_targets]
        for number, entry in enumerate(planned, 1):
            if entry.searches:
                if planner is None:
                    raise ArgumentError(f"`planner` must be given for the method {entry.name!r}, got None.")
                source = auto_source(entry, planner(), transformer, budgets)
            else:
                source = methods[entry.name].source()
            text = f"Planning {entry.name} ({number} of {len(planned)})"
            with variant_timer(transformer, images) as timer, progress_bar(text, time_limit, verbose) as on_step:
                source.restart(search_targets(timer, source, budgets, time_limit, on_step))
            sources: list[CandidateSource] = [source]
            for budget in budgets:
                search = CandidateSearch(budget, sources, 1.0, tuning=TARGET_TUNING)
                targets[entry.name, float(budget.speedup or 1)] = Target(budget, source, search)
        others = [DENSE, *(methods[entry.name].variant() for entry in usable if not entry.has_targets)]
        runs = {entry.name: variant_of(fixed[entry.name], entry) for entry in entries if entry.name in fixed}
        others += runs.values()
        limit = time_limit * (len(usable) + len(fixed))
        with (
            variant_timer(transformer, images) as timer,
            progress_bar("Timing all variants", limit, verbose) as on_step,
        ):
            verify_targets(timer, list(targets.values()), others, TUNING.final_rounds, limit, on_step)
            variants = [*others, *(t.candidate.variant for t in targets.values() if t.candidate is not None)]
            timings = {variant: timer.result(variant) for variant in variants}
    rows: list[PlannedVariant] = [PlannedVariant("dense", "dense", timing=timings[DENSE])]
    unreached: list[UnreachedTarget] = []
    for entry in entries[1:]:
        if entry.name in fixed:
            rows.append(replace(fixed[entry.name], timing=timings[runs[entry.name]]))
            continue
        method = methods[entry.name]
        if unusable[entry.name] is not None:
            rows.append(method.row(None, None, unusable[entry.name] or ""))
        elif not entry.has_targets:
            rows.append(method.row(None, timings[method.variant()], method.note))
        for speedup in speedups if unusable[entry.name] is None and entry.has_targets else ():
            target = targets[entry.name, speedup]
            if target.exhausted or target.candidate is None:
                reason = f"timed up to {target.source.fastest().schedule}, the most that the method can remove"
                unreached.append(UnreachedTarget(entry.name, speedup, target.best_speedup, reason))
            else:
                rows.append(method.row(target, timings[target.candidate.variant], "", context))
    with ready_to_run(transformer):
        rows, energy = with_energy(transformer, images, rows, {entry.name: entry for entry in entries}, verbose)
    return ComparisonPlan(rows, unreached, context, n, energy, time.perf_counter() - start, started)


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
                    reading = measure_energy(
                        lambda: transformer.compiled_root(images), len(images), images.device, counter
                    )
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


def _plain(value: Any) -> Any:
    """A setting as a file can hold it."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
