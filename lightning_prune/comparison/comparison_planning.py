"""The plan of a comparison within one time limit: the schedule of each variant, then one run that times them all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from lightning_prune._utils.device import synchronize
from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.callbacks.batches import Calibration
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.callbacks.planned_schedule import planned_for
from lightning_prune.comparison.compared_method import ComparedMethod
from lightning_prune.comparison.final_run import Target, verify_targets, with_energy
from lightning_prune.comparison.objective_planning import (
    ObjectiveGroup,
    dense_if_slower,
    objective_groups,
    variant_of_decision,
)
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant, UnreachedTarget, variant_of
from lightning_prune.comparison.requests import DENSE_NAME, ComparisonSettings, VariantRequest
from lightning_prune.comparison.target_search import TUNING, auto_source, search_targets
from lightning_prune.errors import UnsupportedModelError
from lightning_prune.planning import measurements
from lightning_prune.planning.candidate_search import CandidateSearch, CandidateSource
from lightning_prune.planning.latency_model import PROBES
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.objectives import LatencyBudget
from lightning_prune.planning.ordered_candidates import TARGET_TUNING
from lightning_prune.profiling import DENSE, LatencyStats, Variant, measurement_context
from lightning_prune.profiling.cache import CachedProfile, get_or_profile
from lightning_prune.profiling.measurement import check_dense, ready_to_run
from lightning_prune.profiling.model_variants import variant_timer

NOT_PLANNED = "not planned for lack of time (`time_limit`)"


@dataclass(frozen=True)
class ShareTuning:
    """How the time limit is divided: each task gets its weight over that of all tasks that are still to do.

    Attributes:
        curve: Weight of the latency curve where schedules are planned on it; half of it where none is.
        method: Weight of the first method that is planned in a task; the final run has it, too.
        further: Weight of each further method or objective of the same task.
        variant: Weight of each variant in the final run.
        front_share: Share of the task of `auto` at target speed-ups in which its methods are measured.
    """

    curve: float = 1.0
    method: float = 1.0
    further: float = 0.5
    variant: float = 0.25
    front_share: float = 0.6


SHARES = ShareTuning()


class TimeShares:
    """Divides what is left of a time limit among the tasks that are still to do.

    Args:
        limit: The time limit of all tasks.
        weights: Task -> its weight; the last is always done, the others if there is time.
        reserved: Seconds of the last task that no other may take.

    Example:
        >>> from lightning_prune.comparison.comparison_planning import TimeShares
        >>> from lightning_prune._utils.time_limit import TimeLimit
        >>> shares = TimeShares(TimeLimit(60, clock=lambda: 0.0), {"pomt": 1, "tome": 1, "final": 2}, reserved=4)
        >>> shares.seconds("pomt"), shares.seconds("tome", least=30), shares.seconds("final")
        (14.0, 30, 60.0)
    """

    def __init__(self, limit: TimeLimit, weights: Mapping[str, float], reserved: float) -> None:
        self.limit, self.reserved = limit, reserved
        self._weights, self._last = dict(weights), list(weights)[-1]
        self._is_first = True

    def seconds(self, task: str, least: float = 0.0) -> float | None:
        """The share of a task that begins now; None if there is no time for it, but never for the first one.

        Args:
            task: Its name; each is asked for once.
            least: Seconds that it takes at least.
        """
        share = self._weights[task] / sum(self._weights.values())
        del self._weights[task]
        if task == self._last:
            return self.limit.left()
        free = max(self.limit.left() - self.reserved, 0.0)
        is_first, self._is_first = self._is_first, False
        return None if least > free and not is_first else max(share * free, least)


class ComparisonPlanner:
    """Plans all variants of a comparison and times them together, on the first batch.

    Args:
        first: The first batch.
        settings: What was asked for.
        calibration: Images to estimate accuracy on; None where nothing needs them.
        given: Request -> its variant, where the schedule was given.
        limit: The time limit of everything that is done here, except energy, and the paper's protocol.
        on_message: Called with lines about the progress.
    """

    def __init__(
        self,
        first: FirstBatch,
        settings: ComparisonSettings,
        calibration: Calibration | None,
        given: Mapping[str, PlannedVariant],
        limit: TimeLimit,
        on_message: Callable[[str], None],
    ) -> None:
        self.first, self.settings, self.calibration, self.limit = first, settings, calibration, limit
        self.on_message = on_message
        self.fixed = dict(given)  # request -> the variant whose schedule is known
        self.decisions: dict[str, Decision] = {}
        self.budgets = [LatencyBudget(speedup=speedup) for speedup in settings.speedups]
        self.targets: dict[tuple[str, LatencyBudget], Target] = {}
        self.not_planned: set[str] = set()
        self.groups = objective_groups(settings.config, settings.requests)

    def plan(self) -> ComparisonPlan:
        """Plans and times the variants.

        Raises:
            UnsupportedModelError: If no method can be used with this model; says why for each.
        """
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        transformer, images, requests = self.first.transformer, self.first.images, self.settings.requests
        check_dense(transformer)
        with ready_to_run(transformer):
            self.tokens = transformer.count_tokens(images)
            context = measurement_context(transformer.compiled_root, images)
            self._find_methods()
            self.seconds_per_pass = self._time_a_pass()
        if self.settings.config.verbose:
            self.on_message(f"Planning and timing take up to {self.limit.seconds:g} s (`time_limit`).")
        weights = self._weights()
        curve_weight = SHARES.curve * (1.0 if self.calibration is not None else 0.5)
        curve = self._measure_curve(curve_weight / (curve_weight + sum(weights.values())))
        self.shares = TimeShares(self.limit, weights, self._least_of_final_run())
        for group in self.groups:
            self._plan_group(group, curve)
        with ready_to_run(transformer):
            for request in self.usable:
                if request.has_targets:
                    self._plan_targets(request, curve)
            timings = self._time_all()
        planned, unreached = self._planned(timings, context)
        seconds = self.limit.elapsed
        with ready_to_run(transformer):
            named, verbose = {request.name: request for request in requests}, self.settings.config.verbose
            planned, energy = with_energy(transformer, images, planned, named, verbose)
        return ComparisonPlan(
            planned=[dense_if_slower(p, self.decisions.get(p.request), planned[0]) for p in planned],
            unreached=unreached,
            context=context,
            dense_tokens=self.tokens,
            energy=energy,
            seconds=seconds,
            started=started,
            profile=curve.profile,
            calibration="" if self.calibration is None else self.calibration.source,
        )

    def _find_methods(self) -> None:
        """Which requests can be used with this model."""
        config, images = self.settings.config, self.first.images
        block = 0.25 if config.block == "auto" else config.block
        by_objective = {request.name for group in self.groups for request in group.requests}
        known = {DENSE_NAME, *self.fixed, *by_objective}
        searched = [request for request in self.settings.requests if request.name not in known]
        self.methods = {r.name: ComparedMethod(self.first.transformer, r, self.tokens, block) for r in searched}
        self.unusable = {name: method.unsupported_reason(images) for name, method in self.methods.items()}
        self.usable = [request for request in searched if self.unusable[request.name] is None]
        if not self.usable and known == {DENSE_NAME}:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.unusable.items())
            raise UnsupportedModelError(f"None of the methods can be used with this model. {reasons}")

    def _time_a_pass(self) -> float:
        """Seconds of one pass of the dense model, by the clock of the time limit."""
        seconds = 0.0
        for _ in range(2):  # the first pass is slow
            start = self.limit.clock()
            self.first.transformer.compiled_root(self.first.images)
            synchronize(self.first.images.device)
            seconds = self.limit.clock() - start
        return seconds

    def _weights(self) -> dict[str, float]:
        """The tasks after the latency curve."""
        weights = {}
        for group in self.groups:
            further = len(group.config.methods) + len(group.requests) - 2
            weights[group.name] = SHARES.method + SHARES.further * further
        for request in self.usable:
            if request.has_targets:
                weights[request.name] = SHARES.method + SHARES.further * max(len(request.searched) - 1, 0)
        return {**weights, "final": SHARES.method + SHARES.variant * self._expected_variants()}

    def _expected_variants(self) -> int:
        with_targets = sum(request.has_targets for request in self.usable)
        single = len(self.usable) - with_targets + len(self.fixed) + sum(len(group.requests) for group in self.groups)
        return 1 + single + with_targets * len(self.budgets)

    def _least_of_final_run(self) -> float:
        return (1 + TUNING.min_final_rounds) * self._expected_variants() * self.seconds_per_pass

    def _least_of_search(self) -> float:
        """Seconds that the search for target speed-ups takes at least: each amount is run twice, and dense with it."""
        passes = 2 + 2 * TUNING.grid_points[0] + 1 + 2 * len(self.budgets) + 1
        return passes * self.seconds_per_pass

    def _least_of_front(self) -> float:
        """Seconds that the front of one method takes at least: overhead, sensitivity, proxies, and a timing run."""
        tuning, depth = measurements.TUNING, self.first.transformer.depth
        images = 1 + tuning.sensitivity_counts * depth / 2 + tuning.min_proxies * tuning.min_images
        passes = PROBES * tuning.min_runs_per_probe + images / len(self.first.images) + 4
        return passes * self.seconds_per_pass

    def _measure_curve(self, share: float) -> CachedProfile:
        """The latency curve, in a share of the whole time limit: the same each time, so that a kept one is used."""
        config = self.settings.config
        found = get_or_profile(
            self.first.module,
            self.first.images,
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
        return found

    def _plan_group(self, group: ObjectiveGroup, curve: CachedProfile) -> None:
        """Plans the requests of a group together."""
        config = group.config
        is_paper = config.protocol == "paper"
        seconds = self.shares.seconds(group.name, 0.0 if is_paper else self._least_of_front())
        if seconds is None:
            self.not_planned |= {request.name for request in group.requests}
            return
        assert self.calibration is not None
        if config.verbose:
            self.on_message(f"Planning {group.name}")
        module, images, limit = self.first.module, self.first.images, TimeLimit(max(seconds, 1e-3), self.limit.clock)
        made = planned_for(
            config, module, images, self.calibration, group.objectives, None if is_paper else curve, limit
        )
        for request, decision in zip(group.requests, made, strict=True):
            self.decisions[request.name] = decision
            self.fixed[request.name] = variant_of_decision(request, decision)
        if is_paper:  # hours on a CPU, and nothing of it can be cut short: the limit is that of all the rest
            self.limit.start += limit.elapsed

    def _plan_targets(self, request: VariantRequest, curve: CachedProfile) -> None:
        """Finds candidates for the target speed-ups of one method; the final run verifies them."""
        config, transformer, images = self.settings.config, self.first.transformer, self.first.images
        least = self._least_of_search() + (self._least_of_front() if request.searches else 0.0)
        seconds = self.shares.seconds(request.name, least)
        if seconds is None:
            self.not_planned.add(request.name)
            return
        limit = TimeLimit(max(seconds, 1e-3), self.limit.clock)
        if request.searches:
            measured = self._measurements(curve, TimeLimit(limit.share(SHARES.front_share), self.limit.clock))
            source = auto_source(request, measured, transformer, self.budgets)
        else:
            source = self.methods[request.name].source()
        with (
            variant_timer(transformer, images, self.limit.clock) as timer,
            progress_bar(f"Planning {request.name}", limit.left(), config.verbose) as on_step,
        ):
            source.restart(search_targets(timer, source, self.budgets, limit.left(), on_step))
        sources: list[CandidateSource] = [source]
        for budget in self.budgets:
            search = CandidateSearch(budget, sources, 1.0, tuning=TARGET_TUNING)
            self.targets[request.name, budget] = Target(budget, source, search)

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
        )

    def _time_all(self) -> dict[Variant, LatencyStats]:
        """Times all variants in one interleaved run, in which targets that are missed move to other amounts."""
        requests = {request.name: request for request in self.settings.requests}
        others = [DENSE, *(self.methods[r.name].variant() for r in self.usable if not r.has_targets)]
        others += [variant_of(planned, requests[name]) for name, planned in self.fixed.items()]
        seconds = self.shares.seconds("final") or 0.0
        targets, config = list(self.targets.values()), self.settings.config
        with (
            variant_timer(self.first.transformer, self.first.images, self.limit.clock) as timer,
            progress_bar("Timing all variants", seconds, config.verbose) as on_step,
        ):
            verify_targets(timer, targets, others, TUNING.final_rounds, seconds, on_step)
            variants = [*others, *(target.candidate.variant for target in targets if target.candidate is not None)]
            return {variant: timer.result(variant) for variant in variants}

    def _planned(
        self, timings: Mapping[Variant, LatencyStats], context: Mapping[str, Any]
    ) -> tuple[list[PlannedVariant], list[UnreachedTarget]]:
        """All variants with their timings, dense first, and the targets that no variant reaches."""
        dense, *others = self.settings.requests
        found = [PlannedVariant(dense.name, dense.name, timing=timings[DENSE])]
        unreached: list[UnreachedTarget] = []
        for request in others:
            name = request.name
            if name in self.not_planned:
                found.append(PlannedVariant(name, name, request.method, request.int8, note=NOT_PLANNED))
            elif name in self.fixed:
                found.append(replace(self.fixed[name], timing=timings[variant_of(self.fixed[name], request)]))
            elif (reason := self.unusable[name]) is not None:
                found.append(self.methods[name].planned(note=reason))
            elif not request.has_targets:
                method = self.methods[name]
                found.append(method.planned(timing=timings[method.variant()], note=method.note))
            else:
                for budget in self.budgets:
                    target, method = self.targets[name, budget], self.methods[name]
                    if target.exhausted or target.candidate is None:
                        unreached.append(target.unreached(name))
                    else:
                        found.append(method.planned_for(target, timings[target.candidate.variant], context))
        return found, unreached
