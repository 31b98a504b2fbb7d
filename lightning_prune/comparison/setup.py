"""The first batch of a comparison: what is known already, schedules and latencies of all variants, token traces."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
from torch import Tensor

from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.batches import Calibration
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import FirstBatch, open_first_batch
from lightning_prune.callbacks.planned_schedule import planned_for, profiled
from lightning_prune.comparison.method_search import search_methods
from lightning_prune.comparison.resume import (
    ResumeState,
    VariantResult,
    data_identity,
    fingerprint_of,
    tensor_digest,
    weights_digest,
)
from lightning_prune.comparison.variants import (
    ComparisonPlan,
    PlannedVariant,
    VariantRequest,
    reduction_of,
)
from lightning_prune.errors import DataError
from lightning_prune.patching import TokenTrace, check_schedule, trace_tokens
from lightning_prune.patching.compatibility import check_depth
from lightning_prune.patching.schedule_forms import resolve_schedule
from lightning_prune.planning.measurements import Measurements
from lightning_prune.profiling import LatencyProfile, measurement_context
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import KeepRates

_PICTURES = 4  # images whose tokens are traced


@dataclass(frozen=True)
class ComparisonSettings:
    """What was asked for.

    Attributes:
        config: All settings of pruning.
        requests: What is compared, dense first.
        speedups: The targets, ascending; empty where there are none.
        output: Folder for what is written; None where nothing is.
        resume: Whether to go on from what is known there.
        limit_val_batches: Of the trainer.
    """

    config: PruningConfig
    requests: Sequence[VariantRequest]
    speedups: Sequence[float]
    output: Path | None
    resume: bool
    limit_val_batches: int | float | None


class ComparisonSetup(L.Callback):
    """Plans all variants on the first batch of a validation run of one batch, unless that is known already.

    Args:
        settings: What was asked for.
        on_message: Called with lines about the progress, on rank 0.

    Attributes:
        plan: The plan; None before the first batch.
        results: Results of variants that were validated before.
        state: What is known on disk; None on ranks other than 0, and where nothing is written.
        pictures: A few images of the dataset, on rank 0.
        traces: Variant -> what became of their patches, on rank 0.
    """

    def __init__(self, settings: ComparisonSettings, on_message: Callable[[str], None]) -> None:
        self.settings, self.on_message = settings, on_message
        self.plan: ComparisonPlan | None = None
        self.results: dict[str, VariantResult] = {}
        self.state: ResumeState | None = None
        self.pictures: Tensor | None = None
        self.traces: dict[str, TokenTrace] = {}

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Plans, once."""
        if self.plan is None and not dataloader_idx:
            with open_first_batch(trainer, pl_module, batch, self.settings.config) as first:
                self.plan, self.results = first.on_rank_zero(lambda: self._set_up(first))

    def _set_up(self, first: FirstBatch) -> tuple[ComparisonPlan, dict[str, VariantResult]]:
        given = {r.name: _given_variant(first, r) for r in self.settings.requests if r.schedule is not None}
        calibration = None
        if any(request.searches or request.objective is not None for request in self.settings.requests):
            calibration = first.calibration()
        if self.settings.output is not None:
            self.state = ResumeState(self.settings.output, self._fingerprint(first, calibration), self.settings.resume)
        plan = self.state.plan() if self.state is not None else None
        if plan is None:
            self._report_other_states()
            plan = self._make_plan(first, calibration, given)
            if self.state is not None:
                self.state.keep_plan(plan)
        results = self._known_results(plan)
        pictures = self._sample_pictures(first)
        self.pictures = pictures.detach().cpu()
        self.traces = self._trace(first, pictures, plan)
        return plan, results

    def _fingerprint(self, first: FirstBatch, calibration: Calibration | None) -> dict[str, Any]:
        config = self.settings.config
        settings: dict[str, Any] = {
            "block": config.block,
            "time_limit": config.time_limit,
            "module_path": config.module_path,
            "protocol": config.protocol,
            "runtime": config.runtime,
        }
        if calibration is not None:
            settings |= {"calibration": tensor_digest(calibration.images), "seed": config.seed}
        return fingerprint_of(
            weights=weights_digest(first.module),
            data=data_identity(first.trainer.val_dataloaders, first.batch, self.settings.limit_val_batches),
            context=measurement_context(first.transformer.compiled_root, first.images),
            requests=self.settings.requests,
            speedups=self.settings.speedups,
            settings=settings,
        )

    def _make_plan(
        self, first: FirstBatch, calibration: Calibration | None, given: Mapping[str, PlannedVariant]
    ) -> ComparisonPlan:
        start, started = perf_counter(), datetime.now().astimezone().isoformat(timespec="seconds")
        config, requests = self.settings.config, self.settings.requests
        general = replace(config, method="auto", schedule="auto", objective=None, block=0.25, protocol="deployed")
        found = profiled(general, first.module, first.images)
        if found.reused and calibration is not None:  # where schedules are planned on it
            when = found.profile.context.get("measured", "before")
            self.on_message(f"The latency profile was measured {when}; --prune.use_cache false measures it again.")
        decisions: dict[str, Decision] = {}
        fixed = dict(given)
        for request in requests:
            if request.objective is not None:
                assert calibration is not None
                decisions[request.name] = self._plan_by_objective(first, calibration, request, found)
                fixed[request.name] = _variant_of_decision(request, decisions[request.name])
        planner = None
        if calibration is not None:
            planner = partial(self._measurements, first, calibration.images, found.profile)
        plan = search_methods(
            first.transformer,
            first.images,
            requests,
            self.settings.speedups,
            block=0.25 if config.block == "auto" else config.block,
            time_limit=config.time_limit,
            verbose=config.verbose,
            planner=planner,
            fixed=fixed,
        )
        dense = plan.planned[0]
        return replace(
            plan,
            seconds=perf_counter() - start,
            started=started,
            planned=[_dense_if_slower(p, decisions.get(p.request), dense) for p in plan.planned],
            profile=found.profile,
            calibration="" if calibration is None else calibration.source,
        )

    def _plan_by_objective(
        self, first: FirstBatch, calibration: Calibration, request: VariantRequest, found: Any
    ) -> Decision:
        config = _config_of(self.settings.config, request)
        assert request.objective is not None
        if config.verbose:
            self.on_message(f"Planning {request.name}")
        profile = None if config.protocol == "paper" else found
        return planned_for(config, first.module, first.images, calibration, [request.objective], profile)[0]

    def _measurements(self, first: FirstBatch, images: Tensor, profile: LatencyProfile) -> Measurements:
        """What `auto` plans target speed-ups with."""
        config = self.settings.config
        return Measurements(
            model=first.module,
            transformer=first.transformer,
            images=images,
            example_inputs=first.images,
            profile=profile,
            is_foreign=False,
            limit=TimeLimit(config.time_limit),
            module_path=config.module_path,
            verbose=config.verbose,
        )

    def _known_results(self, plan: ComparisonPlan) -> dict[str, VariantResult]:
        if self.state is None:
            return {}
        variants = [planned.variant for planned in plan.planned if planned.timing is not None]
        found = {variant: self.state.result(variant) for variant in variants}
        known = {variant: result for variant, result in found.items() if result is not None}
        if known:
            count = f"{len(known)} of {len(variants)} variants were finished before"
            self.on_message(f"Resuming from {self.state.folder}: {count}.")
        return known

    def _report_other_states(self) -> None:
        if self.state is None:
            return
        folder, changed, unreadable = self.state.folder.parent, self.state.changed_settings(), self.state.unreadable()
        if changed:
            self.on_message(f"A new comparison: {', '.join(changed)} differ from what is kept in {folder}.")
        if unreadable:
            names = ", ".join(path.name for path in unreadable)
            self.on_message(f"Not resumed, since another release wrote them or they are damaged: {names} in {folder}.")

    def _sample_pictures(self, first: FirstBatch) -> Tensor:
        """A few images from all over the dataset; from the first batch if it cannot be sampled, or sizes differ.

        Folders are read class by class, so that the first batch shows one class, and at batch size 1 one image.
        """
        images = first.images
        try:
            found = first.sample(_PICTURES).images
        except DataError:
            found = images
        same = found.shape[1:] == images.shape[1:]
        return (found if same else images)[:_PICTURES].to(images.device, images.dtype)

    def _trace(self, first: FirstBatch, images: Tensor, plan: ComparisonPlan) -> dict[str, TokenTrace]:
        """One variant of each request in float: at the largest target that all reach, where there is one."""
        variants: dict[str, list[PlannedVariant]] = {}
        requests = {r.name: r for r in self.settings.requests if not r.int8 and r.method}
        for planned in plan.planned:
            removes = planned.schedule is None or planned.schedule.total_removed > 0
            if planned.timing is not None and planned.request in requests and removes:
                variants.setdefault(planned.request, []).append(planned)
        with_targets = [group for group in variants.values() if group[0].target_speedup is not None]
        shared = [s for s in self.settings.speedups if all(s in {p.target_speedup for p in g} for g in with_targets)]
        traces = {}
        for name, group in variants.items():
            middle = group[len(group) // 2]
            chosen = next((p for p in group if shared and p.target_speedup == shared[-1]), middle)
            reduction = reduction_of(chosen, requests[name])
            assert reduction is not None  # as every request with a method and a timing has one
            path = self.settings.config.module_path
            trace = trace_tokens(first.module, images, reduction, chosen.schedule, module_path=path)
            traces[chosen.variant] = TokenTrace(trace.groups.cpu(), trace.held.cpu(), trace.tokens.cpu(), trace.grid)
        return traces


def _config_of(config: PruningConfig, request: VariantRequest) -> PruningConfig:
    """The settings with which `TokenPruning` would plan a request."""
    method: str | Reduction = request.reduction if request.reduction is not None else "auto"
    block: Any = config.block
    if not isinstance(method, Reduction) or (block == "auto" and method.site != "block"):
        block = 0.25
    is_own = method == config.method
    protocol: Any = config.protocol if is_own else "deployed"
    return replace(config, method=method, block=block, objective=request.objective, schedule="auto", protocol=protocol)


def _variant_of_decision(request: VariantRequest, decision: Decision) -> PlannedVariant:
    assert decision.plan is not None
    chosen = decision.reduction.name if request.searches and decision.reduction is not None else ""
    reduction = decision.reduction if request.searches else request.reduction
    plan: Mapping[str, Any] = json.loads(json.dumps(decision.plan.to_dict()))  # as it will be read back
    return PlannedVariant(
        variant=request.name,
        request=request.name,
        method=request.method,
        chosen=chosen,
        settings={} if reduction is None else _plain_settings(reduction),
        schedule=decision.schedule,
        note=chosen if decision.schedule.total_removed else "",
        plan={**plan, "calibration": decision.calibration},
    )


def _given_variant(first: FirstBatch, request: VariantRequest) -> PlannedVariant:
    """The variant of a schedule that was given, checked against the model."""
    transformer, reduction, config = first.transformer, request.reduction, first.config
    assert reduction is not None
    assert request.schedule is not None
    value = resolve_schedule(request.schedule, transformer, reduction, config.place, first.images)
    with ready_to_run(transformer):
        tokens = transformer.count_tokens(first.images)
    if isinstance(value, KeepRates):
        check_depth(transformer, value)
        counts, rates = value.schedule(tokens, transformer.num_prefix_tokens), value
    else:
        counts, rates = value, None
    check_schedule(transformer, reduction, counts)
    return PlannedVariant(
        variant=request.name,
        request=request.name,
        method=request.method,
        settings=_plain_settings(reduction),
        schedule=counts,
        keep_rates=rates,
    )


def _plain_settings(reduction: Reduction) -> dict[str, Any]:
    """The settings of a method as a file can hold them."""
    plain = bool | int | float | str | None
    return {k: value if isinstance(value, plain) else repr(value) for k, value in reduction.settings().items()}


def _dense_if_slower(planned: PlannedVariant, decision: Decision | None, dense: PlannedVariant) -> PlannedVariant:
    """A variant of an objective; one that removes nothing if it is not faster than dense in the run of all variants."""
    if decision is None or decision.plan is None or planned.timing is None or planned.plan is None:
        return planned
    made = replace(decision.plan, dense=dense.timing, pruned=planned.timing).or_dense_if_slower()
    if made.schedule == planned.schedule:
        return planned
    return replace(
        planned,
        schedule=made.schedule,
        timing=dense.timing,
        joules_per_image=dense.joules_per_image,
        watts=dense.watts,
        note="nothing is gained",
        plan={**planned.plan, "reason": made.reason},
    )
