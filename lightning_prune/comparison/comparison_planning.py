"""The plan of a comparison within one time limit: the schedule of each variant, then one run that times them all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from lightning_prune._utils.progress import expect_seconds, progress_bar
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.callbacks.batches import Calibration
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.callbacks.planned_schedule import planned_for, proxy_for
from lightning_prune.comparison.final_run import FinalTimer, Target, verify_targets
from lightning_prune.comparison.least_times import LeastTimes
from lightning_prune.comparison.objective_planning import ObjectiveGroup, dense_if_slower, variant_of_decision
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant, UnreachedTarget, variant_of
from lightning_prune.comparison.requests import ComparisonSettings, VariantRequest
from lightning_prune.comparison.resume import ResumeState
from lightning_prune.comparison.target_search import TUNING, AutoFront, auto_front, auto_source, search_targets
from lightning_prune.comparison.time_shares import SHARES, TimeShares
from lightning_prune.comparison.usable_requests import UsableRequests
from lightning_prune.comparison.variant_costs import with_energy, with_model_costs
from lightning_prune.errors import DataError
from lightning_prune.planning.candidate_search import CandidateSearch
from lightning_prune.planning.candidates import CandidateSource
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.objectives import LatencyBudget
from lightning_prune.planning.ordered_candidates import TARGET_TUNING
from lightning_prune.planning.reasons import dominated_texts
from lightning_prune.profiling import DENSE, Variant, measurement_context
from lightning_prune.profiling.measurement import check_dense, ready_to_run
from lightning_prune.profiling.model_variants import variant_timer
from lightning_prune.profiling.page_faults import fault_context
from lightning_prune.profiling.profile_reuse import CachedProfile, get_or_profile
from lightning_prune.runtimes import Runtime

NOT_PLANNED = "not planned for lack of time (`time_limit`)"


class ComparisonPlanner:
    """Plans all variants of a comparison and times them together, on the first batch.

    Args:
        first: The first batch.
        settings: What was asked for.
        calibration: Images to estimate accuracy on; None where nothing needs them.
        given: Request -> its variant, where the schedule was given.
        limit: The time limit of everything that is done here, except energy, and the paper's protocol.
        on_message: Called with lines about the progress.
        state: Where schedules are kept as soon as they are planned; None where they are not.
    """

    def __init__(
        self,
        first: FirstBatch,
        settings: ComparisonSettings,
        calibration: Calibration | None,
        given: Mapping[str, PlannedVariant],
        limit: TimeLimit,
        on_message: Callable[[str], None],
        state: ResumeState | None = None,
    ) -> None:
        self.first, self.settings, self.calibration, self.limit = first, settings, calibration, limit
        self.on_message, self.state = on_message, state
        self.fixed = dict(given)  # request -> the variant whose schedule is known
        self.budgets = [LatencyBudget(speedup=speedup) for speedup in settings.speedups]
        self.targets: dict[tuple[str, LatencyBudget], Target] = {}
        self.not_planned: dict[str, str] = {}  # request -> why
        self.contexts: dict[Runtime, dict[str, Any]] = {}
        self.curves: dict[Runtime, CachedProfile] = {}
        self.fronts: dict[Runtime, AutoFront] = {}
        self.least = LeastTimes(first.transformer, first.images, limit.clock)

    def plan(self) -> ComparisonPlan:
        """Plans and times the variants.

        Raises:
            UnsupportedModelError: If no method can be used with this model; says why for each.
        """
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        transformer, images, settings = self.first.transformer, self.first.images, self.settings
        check_dense(transformer)
        with ready_to_run(transformer):
            self.tokens = transformer.count_tokens(images)
            self.asked = UsableRequests.of(self.first, settings, self.tokens, self.fixed)
        if self.asked.left_out:
            listed = "; ".join(f"{name}: {reason}" for name, reason in self.asked.left_out.items())
            self.on_message(f"Controls that this model does not support are left out. {listed}")
        if settings.config.verbose:
            self.on_message(f"Planning and timing take up to {self.limit.seconds:g} s (`time_limit`).")
        expect_seconds(self.limit.left())
        counts = len(settings.runtimes), len(self.budgets)
        weights, variants = self.asked.weights(*counts), self.asked.variants(*counts)
        for runtime in settings.runtimes:
            with runtime.applied(transformer):
                self._measure_runtime(runtime, weights)
        self.costs = self.least.of_costs(variants)
        reserved = self.least.of_final_run(variants) + self.costs
        self.shares = TimeShares(self.limit, weights, reserved)
        if settings.config.verbose and reserved > self.limit.left():
            self.on_message(
                f"{variants} variants in three rounds take at least about {reserved:.0f} s, more than is left of "
                "`time_limit`."
            )
        for runtime in settings.runtimes:
            with runtime.applied(transformer):
                for group in self.asked.groups:
                    if group.runtime == runtime:
                        self._plan_group(group)
                with ready_to_run(transformer):
                    for request in self.asked.usable:
                        if request.has_targets and request.runtime == runtime and request.quantizing is None:
                            self._plan_targets(request)
        with ready_to_run(transformer):
            for request in self.asked.usable:
                if request.has_targets and request.quantizing is not None:  # dense runs in one runtime, they in another
                    self._plan_targets(request, Variant(runtime=request.runtime))
        with ready_to_run(transformer):
            planned, unreached = self._time_all()
            seconds = self.limit.elapsed
            requests = {request.name: request for request in self.asked.requests}
            expect_seconds(None)
            planned = with_model_costs(transformer, images, planned, requests)
            planned, energy = with_energy(transformer, images, planned, requests, settings.config.verbose)
        dense = {each.runtime: each for each in planned if each.is_dense}
        return ComparisonPlan(
            planned=[dense_if_slower(p, dense[p.runtime], self.tokens) for p in planned],
            unreached=unreached,
            context=self._context(),
            dense_tokens=self.tokens,
            energy=energy,
            seconds=seconds,
            started=started,
            profile=self.curves[settings.runtimes[0]].profile,
            calibration="" if self.calibration is None else self.calibration.source,
        )

    def _measure_runtime(self, runtime: Runtime, weights: Mapping[str, float]) -> None:
        """What all planning in a runtime needs: its context, seconds of a pass, and its latency curve.

        The time limit of the curve is a share of the whole, the same each time, so that a kept one is used.
        """
        config, transformer, images = self.settings.config, self.first.transformer, self.first.images
        with ready_to_run(transformer):
            self.contexts[runtime] = measurement_context(transformer.compiled_root, images, self.limit.clock)
            self.least.time_passes(runtime)
        own = SHARES.curve * (1.0 if self.calibration is not None else 0.5)
        share = own / (own * len(self.settings.runtimes) + sum(weights.values()))
        found = get_or_profile(
            self.first.module,
            images,
            config.store(),
            block=0,
            time_limit=share * config.time_limit,
            module_path=config.module_path,
            verbose=config.verbose,
            clock=self.limit.clock,
        )
        if found.reused and self.calibration is not None:  # where schedules are planned on it
            when = found.profile.context.get("measured", "before")
            self.on_message(f"The latency profile was measured {when}; --prune.use_cache false measures it again.")
        self.curves[runtime] = found

    def _context(self) -> dict[str, Any]:
        """What the figures were measured on; of several runtimes all are named."""
        first, *others = (self.contexts[runtime] for runtime in self.settings.runtimes)
        if not others:
            return first
        names = ", ".join(runtime.name for runtime in self.settings.runtimes)
        return {**first, "runtime": names, "compiled": False}

    def _plan_group(self, group: ObjectiveGroup) -> None:
        """Plans the requests of a group together, unless an interrupted run has."""
        config = group.config
        kept = self.state.group(group.name) if self.state is not None else None
        if kept is not None and [each.request for each in kept] == [request.name for request in group.requests]:
            self.shares.skip(group.name)
            self.fixed |= {each.request: each for each in kept}
            self.on_message(f"Planned before: {group.name}")
            return
        is_paper = config.protocol == "paper"
        seconds = self.shares.seconds(group.name, 0.0 if is_paper else self.least.of_front(group.runtime))
        if seconds is None:
            self.not_planned |= dict.fromkeys((request.name for request in group.requests), NOT_PLANNED)
            return
        assert self.calibration is not None
        if config.verbose:
            self.on_message(f"Planning {group.name}")
        module, images, limit = self.first.module, self.first.images, TimeLimit(max(seconds, 1e-3), self.limit.clock)
        curve = None if is_paper else self.curves[group.runtime]
        with progress_bar(f"Planning {group.name}", limit.left(), config.verbose):
            try:
                made = planned_for(config, module, images, self.calibration, group.objectives, curve, limit)
            except DataError as error:  # of its outputs; those of the dense model end the comparison
                self._leave_out([request.name for request in group.requests], error)
                return
        for request, decision in zip(group.requests, made, strict=True):
            self.fixed[request.name] = variant_of_decision(request, decision)
        if self.state is not None:
            self.state.keep_group(group.name, [self.fixed[request.name] for request in group.requests])
        if is_paper:  # hours on a CPU, and nothing of it can be cut short: the limit is that of all the rest
            self.limit.start += limit.elapsed
            expect_seconds(self.limit.left())

    def _plan_targets(self, request: VariantRequest, dense: Variant = DENSE) -> None:
        """Finds candidates for the target speed-ups of one method; the final run verifies them.

        Args:
            request: The method.
            dense: What it is compared with.
        """
        config, transformer, images = self.settings.config, self.first.transformer, self.first.images
        least = self.least.of_search(request.runtime, len(self.budgets))
        if request.searches and request.runtime not in self.fronts:
            least += self.least.of_front(request.runtime)
        seconds = self.shares.seconds(request.name, least)
        if seconds is None:
            self.not_planned[request.name] = NOT_PLANNED
            return
        limit = TimeLimit(max(seconds, 1e-3), self.limit.clock)
        if request.searches:
            try:
                front = self._auto_front(request, limit)
            except DataError as error:
                self._leave_out([request.name], error)
                return
            source = auto_source(request, front, transformer.depth)
        else:
            source = self.asked.methods[request.name].source()
        with (
            variant_timer(transformer, images, self.limit.clock, dense, [request.execution]) as timer,
            progress_bar(f"Planning {request.name}", limit.left(), config.verbose) as on_step,
        ):
            source.restart(search_targets(timer, source, self.budgets, limit.left(), on_step))
        sources: list[CandidateSource] = [source]
        for budget in self.budgets:
            search = CandidateSearch(budget, sources, 1.0, tuning=TARGET_TUNING)
            self.targets[request.name, budget] = Target(budget, source, search)

    def _leave_out(self, names: Sequence[str], error: DataError) -> None:
        """Leaves out requests whose methods give outputs that are no numbers; raises where dense does so itself."""
        transformer, images = self.first.transformer, self.first.images
        with ready_to_run(transformer):
            if not transformer.outputs(images).isfinite().all():
                raise error
        self.not_planned |= dict.fromkeys(names, f"not planned: {error}")

    def _auto_front(self, request: VariantRequest, limit: TimeLimit) -> AutoFront:
        """The front of all methods in the runtime of a request, in floating point; planned once."""
        runtime, transformer = request.runtime, self.first.transformer
        if runtime not in self.fronts:
            own = TimeLimit(limit.share(SHARES.front_share), self.limit.clock)
            with runtime.applied(transformer):
                measured = self._measurements(self.curves[runtime], own)
                self.fronts[runtime] = auto_front(request.searched, measured, transformer, self.budgets)
            for text in dominated_texts(self.fronts[runtime].dominated):
                self.on_message(f"{request.name}: {text[0].lower()}{text[1:]}")
            if left_out := self.fronts[runtime].left_out:
                self.on_message(f"{request.name}: not searched for lack of time: {', '.join(left_out)}")
        return self.fronts[runtime]

    def _measurements(self, curve: CachedProfile, limit: TimeLimit) -> Measurements:
        """What `auto` plans target speed-ups with."""
        assert self.calibration is not None
        config = self.settings.config
        return Measurements(
            model=self.first.module,
            transformer=self.first.transformer,
            images=self.calibration.images,
            example_inputs=self.first.images,
            profile=curve.profile,
            is_foreign=False,
            limit=limit,
            module_path=config.module_path,
            verbose=config.verbose,
            proxy_name=proxy_for(config, self.first.module, self.first.transformer, self.calibration),
            use_cache=config.use_cache,
            cache_dir=config.cache_dir,
            tail=config.deployed_tail,
        )

    def _time_all(self) -> tuple[list[PlannedVariant], list[UnreachedTarget]]:
        """Times all variants in one interleaved run, in which targets that are missed move to other amounts."""
        requests, config = {request.name: request for request in self.asked.requests}, self.settings.config
        others = [Variant(runtime=request.runtime) for request in requests.values() if request.is_dense]
        others += [self.asked.methods[r.name].variant() for r in self.asked.usable if not r.has_targets]
        others += [variant_of(planned, requests[name]) for name, planned in self.fixed.items()]
        seconds = max((self.shares.seconds("final") or 0.0) - self.costs, 0.0)
        final = FinalTimer(self.first.transformer, self.first.images, self.settings.runtimes, self.limit.clock)
        try:
            with progress_bar("Timing all variants", seconds, config.verbose) as on_step:
                verify_targets(final.timer, list(self.targets.values()), others, TUNING.final_rounds, seconds, on_step)
        finally:
            final.close()
        return self._planned(final)

    def _planned(self, final: FinalTimer) -> tuple[list[PlannedVariant], list[UnreachedTarget]]:
        """All variants with their timings, dense first, and the targets that no variant reaches."""
        found: list[PlannedVariant] = []
        unreached: list[UnreachedTarget] = []
        fault_us = fault_context(self.first.images.device.type).get("fault_us")

        def add(planned: PlannedVariant, variant: Variant, dense: Variant) -> None:
            timing, against_eager = final.timer.result(variant, dense), final.speedup_vs_eager(variant)
            notes = [planned.note, timing.fault_remark(final.timer.result(dense, dense), fault_us)]
            note = "; ".join(filter(None, notes))
            found.append(replace(planned, timing=timing, speedup_vs_eager=against_eager, note=note))

        methods = self.asked.methods
        for request in self.asked.requests:
            name, runtime, dense = request.name, request.runtime.name, Variant(runtime=request.runtime)
            if request.is_dense:
                add(PlannedVariant(name, name, runtime=runtime), dense, dense)
            elif name in self.not_planned:
                note = self.not_planned[name]
                found.append(PlannedVariant(name, name, request.method, request.int8, note=note, runtime=runtime))
            elif name in self.fixed:
                add(self.fixed[name], variant_of(self.fixed[name], request), dense)
            elif (reason := self.asked.unusable[name]) is not None:
                found.append(methods[name].planned(note=reason))
            elif not request.has_targets:
                add(methods[name].planned(note=methods[name].note), methods[name].variant(), dense)
            else:
                for budget in self.budgets:
                    target, context = self.targets[name, budget], self.contexts[request.runtime]
                    if target.exhausted or target.candidate is None:
                        unreached.append(target.unreached(name))
                    else:
                        variant = target.candidate.variant
                        timing = final.timer.result(variant, dense)
                        add(methods[name].planned_for(target, timing, context), variant, dense)
        return found, unreached
