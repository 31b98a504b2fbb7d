"""The POMT paper's computation: random tokens removed before block 0, at every count, judged on labelled images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.patching.schedule_forms import allocate_schedule
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.measurement_tuning import TUNING
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.objectives import RATIO_TOLERANCE, Objective
from lightning_prune.planning.reasons import dense_reason, missed_budget
from lightning_prune.planning.results import Plan
from lightning_prune.profiling import DENSE_ACCURACY, LatencyProfile, Proxy, profile_latency
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.reduction import RandomDrop, Reduction
from lightning_prune.schedule import Schedule

PAPER_IMAGES = 1024  # labelled images whose accuracy the paper measures


def plan_by_paper(
    model: nn.Module,
    transformer: VisionTransformer,
    example_inputs: Tensor,
    objectives: Sequence[Objective],
    calibration: Tensor,
    labels: Tensor | None,
    methods: Mapping[str, tuple[Reduction, Sequence[int]]],
    profile: LatencyProfile | None,
    limit: TimeLimit,
    module_path: str | None,
    verbose: bool,
) -> list[Plan]:
    """Plans as the POMT paper does (arXiv 2407.05941, section 3.2). Takes hours on a CPU.

    Latency and top-1 accuracy are those of random tokens removed before block 0, measured at every count; the objective
    chooses the best of all counts. The deployed schedule removes as many tokens with the method, in its one block. It
    is timed against dense, but its timing changes nothing, unless it is not faster.

    Args:
        model: The module that contains the transformer, dense.
        transformer: The Vision Transformer.
        example_inputs: (B, C, H, W) images on the device.
        objectives: What to plan for.
        calibration: (images, C, H, W) images; the first 1024 count.
        labels: (images,) int64 labels.
        methods: Label -> the method and its block; one.
        profile: A curve measured with `protocol="paper"`; measured if None.
        limit: The time limit; of the final timing only, as nothing else can be cut short.
        module_path: Dotted path of the transformer in the model.
        verbose: Shows progress bars on a terminal.

    Raises:
        ArgumentError: If there are no labels, or not one method and one block.
        DataError: If a label is out of range.
    """
    if labels is None:
        raise ArgumentError("`labels` must be given with protocol='paper', whose accuracy is top-1; got None.")
    if len(methods) != 1 or len(next(iter(methods.values()))[1]) != 1:
        raise ArgumentError("`methods` and `blocks` must be one method and one block with protocol='paper'.")
    ((label, (reduction, (block,))),) = methods.items()
    if profile is None:
        profile = profile_latency(
            model,
            example_inputs,
            method=reduction,
            block=block,
            protocol="paper",
            time_limit=None,
            module_path=module_path,
            verbose=verbose,
            clock=limit.clock,
        )
    n, depth, prefix = profile.dense_tokens, profile.depth, transformer.num_prefix_tokens
    measured = Measurements(
        model, transformer, calibration, example_inputs, profile, False, limit, module_path, verbose
    )
    size = max(len(example_inputs), TUNING.batch_images)
    drop = RandomDrop(site="input")
    with ready_to_run(transformer), progress_bar("Accuracy at every token count", None, verbose) as on_step:
        images, own = calibration[:PAPER_IMAGES], labels[:PAPER_IMAGES]
        proxy = Proxy(transformer, images, example_inputs.device, size, own, on_step)
        candidates = []
        fewest = n - reduction.max_removed(n, prefix)
        possible = reduction.possible_counts(n, prefix, transformer.grid(example_inputs))
        counts = [count for count in profile.tokens[:-1] if count >= fewest]
        for count in counts if possible is None else sorted({*counts} & {*possible}):
            with PatchHandle(transformer, drop, allocate_schedule(drop, n - count, n, prefix, depth, 0)):
                accuracy = proxy.measure()
            schedule = allocate_schedule(reduction, n - count, n, prefix, depth, block)
            ratio = profile.latency_ms(count) / profile.dense_ms
            candidates.append(Candidate(label, reduction, schedule, ratio, tail=False).with_accuracy(accuracy))
    candidates.append(Candidate(label, reduction, Schedule([0] * depth), 1.0).with_accuracy(DENSE_ACCURACY))
    flat = dense_reason(profile)
    chosen = [candidates[-1] if flat else _best(candidates, objective, profile.dense_ms) for objective in objectives]
    pruned = [candidate for candidate in chosen if not candidate.is_dense]
    dense, timings = measured.time_candidates(pruned) if pruned else (None, {})
    plans = []
    for objective, candidate in zip(objectives, chosen, strict=True):
        timing = timings.get(candidate.key)
        met = timing is not None and objective.violation(timing) <= RATIO_TOLERANCE
        reason = flat or (
            f"Dense is best by {objective}: every faster count costs too much."
            if candidate.is_dense
            else f"Best of all counts by {objective}: {100 * (1 - candidate.ratio):.1f}% less latency by the profile, "
            f"{candidate.estimate} of the dense {proxy.name}, both of random tokens."
        )
        if candidate.is_dense:
            met, reason = (
                objective.dense_is_feasible(profile.dense_ms),
                reason + missed_budget(objective, profile.dense_ms),
            )
        made = Plan.of(
            replace(candidate, timing=timing),
            reduction,
            objective,
            met,
            reason,
            profile,
            proxy=proxy.name,
            dense=None if timing is None else dense,
            front=tuple(reversed(candidates)),
            images=len(images),
            seconds=limit.elapsed,
        )
        plans.append(made.or_dense_if_slower())
    return plans


def _best(candidates: Sequence[Candidate], objective: Objective, dense_ms: float) -> Candidate:
    """The argmax over every count, slower than dense or not; the fastest if none meets a budget."""
    milliseconds = dense_ms * np.array([candidate.ratio for candidate in candidates])
    if objective.infeasible_reason(milliseconds) is not None:
        return candidates[int(np.argmin(milliseconds))]
    return candidates[objective.best(milliseconds, objective.judged([each.estimate for each in candidates]))]
