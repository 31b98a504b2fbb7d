"""From measurements to plans: the search among the fronts of all methods, and the plan where nothing is gained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_prune.planning.candidate_search import CandidateSearch, run_searches
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.measurement_tuning import TUNING
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.objectives import LatencyBudget, Objective
from lightning_prune.planning.profile_validation import nothing_timed
from lightning_prune.planning.reasons import dominated_texts, missed_budget
from lightning_prune.planning.results import Plan
from lightning_prune.profiling import LatencyProfile
from lightning_prune.profiling.page_faults import fault_context
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule


def finished(plan: Plan, seconds: float) -> Plan:
    """A plan with the time that it took; its reason says if the dense model meets the budget, or nothing does.

    Args:
        plan: Without that.
        seconds: What planning took.
    """
    plan = replace(plan, seconds=seconds).or_dense_if_slower()
    if plan.pruned is not None and plan.dense is not None:
        fault_us = fault_context(str(plan.profile.context.get("device_type"))).get("fault_us")
        remark = plan.pruned.fault_remark(plan.dense, fault_us)
        plan = replace(plan, reason=f"{plan.reason} Of the timing: {remark}.") if remark else plan
    if isinstance(plan.objective, LatencyBudget) and plan.objective.dense_is_feasible(plan.dense_ms):
        takes = plan.objective.latency_text(plan.dense_ms, None if plan.dense is None else plan.dense.p90_ms)
        met = f"The dense model meets the {plan.objective}, already: it takes {takes}."
        plan = replace(plan, reason=f"{met} {plan.reason}")
    elif not plan.met and str(plan.objective) not in plan.reason:  # it was timed, and is slower than dense
        missed = f"The {plan.objective} is not met: the dense model is the best that can be had."
        plan = replace(plan, reason=f"{plan.reason} {missed}")
    return plan


def dense_plan(
    methods: Mapping[str, tuple[Reduction, Sequence[int]]],
    objective: Objective,
    profile: LatencyProfile,
    reason: str,
    foreign: Sequence[str],
) -> Plan:
    """The plan for a device that gains nothing from fewer tokens.

    Args:
        methods: Label -> the method and the blocks that may reduce.
        objective: What is planned for.
        profile: The latency curve.
        reason: Why nothing is gained.
        foreign: The conditions of the curve that are not those here.
    """
    nothing = Schedule([0] * profile.depth)
    front = tuple(Candidate(label, reduction, nothing, 1.0, accuracy=1.0) for label, (reduction, _) in methods.items())
    reason += missed_budget(objective, profile.dense_ms)
    reason = nothing_timed(reason, profile, foreign) if foreign else reason
    reduction = next(iter(methods.values()))[0]
    met = objective.dense_is_feasible(profile.dense_ms)
    return Plan.of(front[0], reduction, objective, met, reason, profile, front=front)


def searched(
    measured: Measurements,
    methods: Mapping[str, tuple[Reduction, Sequence[int]]],
    objectives: Sequence[Objective],
    foreign: Sequence[str],
) -> list[Plan]:
    """The plans of all objectives, from the fronts of all methods.

    Args:
        measured: What planning measures.
        methods: Label -> the method and the blocks that may reduce.
        objectives: What is planned for.
        foreign: The conditions of the curve that are not those here.
    """
    fronts = measured.fronts(methods, objectives)
    proxy, limit = measured.proxy_label, measured.limit
    searches = [CandidateSearch(objective, fronts, measured.dense_ms, proxy) for objective in objectives]
    if measured.is_foreign:
        for search in searches:
            search.next_candidates(limit.deadline(), limit.clock)
    else:
        run_searches(searches, measured.time_candidates, limit.deadline(), TUNING.proxy_share, limit.clock)
    labels = {front.label for front in fronts}
    known = {*labels, *measured.dominated}
    known |= {label for label in methods if methods[label][0].name in measured.not_finite}
    left_out = [label for label in methods if label not in known]
    plans = []
    for search in searches:
        candidate, met, reason, dense = search.result()
        dropped = [label for label in search.not_promising if label in methods]
        if dropped:
            reason = f"{reason} Predicted to be worse, and not tried: {', '.join(dropped)}."
        reason = " ".join([reason, *dominated_texts(measured.dominated)])
        if left_out:
            reason = f"{reason} Not searched for lack of time: {', '.join(left_out)}."
        for name, error in measured.not_finite.items():
            reason = f"{reason} Left out, {name}: {error}"
        chosen = next(front for front in fronts if front.label == candidate.method)
        if chosen.reduction is None and candidate.is_dense:  # by whichever method
            chosen = fronts[0]
            candidate = replace(candidate, method=chosen.label, reduction=chosen.reduction)
        entries = [front.all_candidates(candidate if front is chosen else None) for front in fronts]
        made = Plan.of(
            candidate,
            chosen.reduction,
            search.objective,
            met,
            nothing_timed(reason, measured.profile, foreign, measured.without_overhead) if foreign else reason,
            measured.profile,
            proxy=proxy,
            dense=dense or measured.dense,  # of now, as the reason says, and not of the profile
            front=tuple(entry for group in entries for entry in group),
            images=len(measured.images),
            sensitivity_images=measured.sensitivity_images,
            sensitivity_seconds=measured.sensitivity_seconds,
        )
        plans.append(made)
    return plans
