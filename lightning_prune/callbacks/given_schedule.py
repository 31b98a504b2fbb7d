"""Timing what the user gave, a schedule or a method whose token count depends on the image, against the dense model."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.patching import PatchHandle, VisionTransformer, check_schedule
from lightning_prune.patching.compatibility import check_depth
from lightning_prune.patching.patched_block import tokens_left
from lightning_prune.patching.schedule_forms import counts_for, reductions_of, resolve_schedule
from lightning_prune.planning.candidates import MIXED
from lightning_prune.profiling import compare_latency
from lightning_prune.profiling.interleaved_timer import LatencyStats
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_variants import Variant
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import KeepRates, Schedule

_TIME_SHARE = 0.2  # of the time limit: there is nothing to plan
_COMPARED = ("device", "batch_size", "precision", "image_shape")  # what a schedule's latency depends on most


def time_given(first: FirstBatch) -> Decision:
    """Times the schedule of the config against the dense model.

    Args:
        first: The batch to time it on. A schedule may name another method in each block; it is then run with these.

    Raises:
        ArgumentError: If the schedule names another method than the config, or one that does not exist.
        ScheduleError: If it was made for another depth or token count, or a block cannot remove that many tokens.
        UnsupportedModelError: As `lightning_prune.patch`.
    """
    transformer = first.transformer
    reduction, schedule = _method_and_schedule(first)
    with ready_to_run(transformer):
        n = transformer.count_tokens(first.images)
    rates = schedule if isinstance(schedule, KeepRates) else None
    if isinstance(schedule, KeepRates):
        check_depth(transformer, schedule)
        counts = counts_for(schedule, transformer, first.images, n, reduction)
    else:
        counts = schedule
    check_schedule(transformer, reduction or reductions_of(schedule), counts)
    pruning = Variant(reduction, counts, tail=first.config.deployed_tail)
    timings = _time(first, pruning if counts.total_removed else None)
    pruned = timings.get("pruned", timings["dense"])  # nothing removed: the model is the dense one
    return Decision(
        schedule=counts,
        method=MIXED if reduction is None else reduction.name,
        dense_tokens=n,
        tokens=counts.tokens(n)[-1],
        dense_ms=timings["dense"].milliseconds,
        latency_ms=pruned.milliseconds,
        speedup=1 / pruned.ratio,
        dense_p90_ms=timings["dense"].p90_ms,
        p90_ms=pruned.p90_ms,
        predicted_ms=None,
        reason="The schedule was given.",
        context=dict(first.context),
        differences=_differences(schedule.made_on, first.context, n),
        keep_rates=rates,
        reduction=reduction,
    )


def time_adaptive(first: FirstBatch) -> Decision:
    """Times the adaptive method of the config against the dense model, on one batch.

    Args:
        first: The batch.

    Raises:
        ArgumentError: If the method was made for another model.
        UnsupportedModelError: If the model cannot do what the method needs.
    """
    transformer, images, reduction = first.transformer, first.images, first.config.reduction
    with ready_to_run(transformer):
        n = transformer.count_tokens(images)
        left = _tokens_left(transformer, images, reduction)
    timings = _time(first, Variant(reduction, tail=first.config.deployed_tail))
    dense, pruned = timings["dense"], timings["pruned"]
    return Decision(
        schedule=Schedule([0] * transformer.depth),
        method=reduction.name,
        dense_tokens=n,
        tokens=left,
        dense_ms=dense.milliseconds,
        latency_ms=pruned.milliseconds,
        speedup=1 / pruned.ratio,
        dense_p90_ms=dense.p90_ms,
        p90_ms=pruned.p90_ms,
        predicted_ms=None,
        reason=f"The images decide; the longest of this batch keeps {left} of {n} tokens.",
        context=dict(first.context),
        reduction=reduction,
        adaptive=True,
    )


def _method_and_schedule(first: FirstBatch) -> tuple[Reduction | None, Schedule | KeepRates]:
    """The method and the schedule of this model; the method is None where the schedule names several."""
    config = first.config
    if config.is_mixed:
        return None, cast(Schedule | KeepRates, config.schedule)
    schedule = resolve_schedule(
        config.schedule, first.transformer, config.reduction, config.reducing_block, first.images
    )
    return config.reduction, schedule


def _time(first: FirstBatch, pruned: Variant | None) -> dict[str, LatencyStats]:
    """Latency of the dense model as "dense" and, unless it is None, of a variant as "pruned"."""
    config = first.config
    variants: dict[str, Variant | None] = {"dense": None} if pruned is None else {"dense": None, "pruned": pruned}
    return compare_latency(
        first.module,
        first.images,
        variants,
        time_limit=min(_TIME_SHARE * config.time_limit, first.limit.share(1.0) or config.time_limit),
        module_path=config.module_path,
        verbose=config.verbose,
        clock=first.config.clock,
    )


def _differences(made_on: MeasurementSource | None, context: Mapping[str, Any], tokens: int) -> tuple[str, ...]:
    """How the place where a schedule was made differs from this run, in words; empty where that is not known."""
    if made_on is None:
        return ()
    here = {key: context[key] for key in _COMPARED}
    return made_on.differences(**here | {"image_shape": tuple(context["image_shape"]), "dense_tokens": tokens})


def _tokens_left(transformer: VisionTransformer, images: Tensor, reduction: Reduction) -> int:
    """Tokens of the longest image that leave the first block, counted in a forward pass."""
    counts: list[int] = []
    block = transformer.blocks[transformer.first_prunable_block]
    with PatchHandle(transformer, reduction):
        hook = block.register_forward_hook(lambda _, args, output: counts.append(tokens_left(output)))
        try:
            transformer.run_eagerly(images)  # not `root(images)`: a compiled graph would not call the hook
        finally:
            hook.remove()
    return counts[0]
