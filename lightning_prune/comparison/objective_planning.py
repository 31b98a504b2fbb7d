"""Variants whose schedule follows from an objective, or was given: planned together where they measure the same."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.comparison.planned_variants import PlannedVariant, chosen_text, plain_settings
from lightning_prune.comparison.requests import VariantRequest
from lightning_prune.patching import check_schedule
from lightning_prune.patching.compatibility import check_depth
from lightning_prune.patching.schedule_forms import counts_for, reductions_of, resolve_schedule
from lightning_prune.planning import Objective
from lightning_prune.planning.reasons import no_gain
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes import Runtime
from lightning_prune.schedule import KeepRates, Schedule


class ObjectiveGroup(NamedTuple):
    """Requests that differ in their objective only, so that one measurement serves all.

    Attributes:
        config: The settings with which `TokenPruning` would plan them.
        requests: The requests, each with an objective.
        runtime: What executes the model.
    """

    config: PruningConfig
    requests: list[VariantRequest]
    runtime: Runtime

    @property
    def name(self) -> str:
        """The names of its requests."""
        return ", ".join(request.name for request in self.requests)

    @property
    def objectives(self) -> list[Objective]:
        """The objectives of its requests."""
        return [request.objective for request in self.requests if request.objective is not None]


def objective_groups(config: PruningConfig, requests: Sequence[VariantRequest]) -> list[ObjectiveGroup]:
    """The requests with an objective, in groups of one runtime with the same methods, blocks and protocol.

    Args:
        config: All settings of pruning.
        requests: What is compared.
    """
    groups: list[ObjectiveGroup] = []
    for request in requests:
        if request.objective is None:
            continue
        own = _config_of(config, request)
        alike = (g for g in groups if g.runtime == request.runtime and _measured_by(g.config) == _measured_by(own))
        group = next(alike, None)
        if group is None:
            groups.append(ObjectiveGroup(own, [request], request.runtime))
        else:
            group.requests.append(request)
    return groups


def variant_of_decision(request: VariantRequest, decision: Decision) -> PlannedVariant:
    """The variant that a plan by an objective makes.

    Args:
        request: What was asked for.
        decision: With a plan.
    """
    assert decision.plan is not None
    chosen = chosen_text(decision.reduction, decision.schedule) if request.searches else ""
    reduction = decision.reduction if request.searches else request.reduction
    plan: Mapping[str, Any] = json.loads(json.dumps(decision.plan.to_dict()))  # as it will be read back
    return PlannedVariant(
        variant=request.name,
        request=request.name,
        method=request.method,
        chosen=chosen,
        settings=plain_settings(reduction),
        schedule=decision.schedule,
        note=chosen if decision.schedule.total_removed else "",
        # Its figures are not those of the final run, which stand next to them.
        plan={**plan, "reason": f"When it was planned: {plan['reason']}", "calibration": decision.calibration},
        runtime=request.runtime.name,
    )


def given_variant(first: FirstBatch, request: VariantRequest) -> PlannedVariant:
    """The variant of a schedule that was given, checked against the model.

    Args:
        first: The first batch.
        request: With a schedule.

    Raises:
        ScheduleError: If the schedule does not fit the model.
    """
    transformer, reduction, config = first.transformer, request.reduction, first.config
    assert request.schedule is not None
    if reduction is None:  # only a Schedule or KeepRates names a method for each block
        value = cast(Schedule | KeepRates, request.schedule)
    else:
        value = resolve_schedule(request.schedule, transformer, reduction, config.reducing_block, first.images)
    with ready_to_run(transformer):
        tokens = transformer.count_tokens(first.images)
    if isinstance(value, KeepRates):
        check_depth(transformer, value)
        counts, rates = counts_for(value, transformer, first.images, tokens, reduction), value
    else:
        counts, rates = value, None
    check_schedule(transformer, reduction or reductions_of(value), counts)
    return PlannedVariant(
        variant=request.name,
        request=request.name,
        method=request.method,
        settings=plain_settings(reduction),
        schedule=counts,
        keep_rates=rates,
        runtime=request.runtime.name,
    )


def dense_if_slower(planned: PlannedVariant, dense: PlannedVariant, dense_tokens: int) -> PlannedVariant:
    """A variant of an objective; one that removes nothing if it is not faster than dense in the run of all variants.

    Args:
        planned: The variant, with its timing of that run.
        dense: The dense model in that run.
        dense_tokens: N.
    """
    if planned.plan is None or planned.schedule is None or planned.timing is None:
        return planned
    reason = no_gain(planned.schedule, dense_tokens, planned.timing)
    if reason is None:
        return planned
    schedule = planned.schedule
    return replace(
        planned,
        schedule=Schedule([0] * schedule.depth, schedule.method, schedule.made_on),
        timing=dense.timing,
        gmacs=dense.gmacs,
        peak_memory_mib=dense.peak_memory_mib,
        joules_per_image=dense.joules_per_image,
        watts=dense.watts,
        note="nothing is gained",
        plan={**planned.plan, "reason": reason},
    )


def _config_of(config: PruningConfig, request: VariantRequest) -> PruningConfig:
    """The settings with which `TokenPruning` would plan a request."""
    method: str | Reduction = request.reduction if request.reduction is not None else "auto"
    block: Any = config.block
    if not isinstance(method, Reduction) or (block == "auto" and method.site != "block"):
        block = 0.25
    protocol: Any = config.protocol if method == config.method else "deployed"
    return replace(config, method=method, block=block, objective=request.objective, schedule="auto", protocol=protocol)


def _measured_by(config: PruningConfig) -> tuple[Any, ...]:
    return config.method, config.block, config.protocol
