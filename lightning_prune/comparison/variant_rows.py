"""The rows of a comparison, from what was planned, timed and validated."""

from collections.abc import Mapping
from typing import Any

from lightning_prune.comparison.paired_statistics import agreement, paired_difference
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant
from lightning_prune.comparison.predictions import Predictions
from lightning_prune.comparison.requests import DENSE_NAME, INT8_NAME
from lightning_prune.comparison.resume import VariantResult
from lightning_prune.profiling import LatencyStats
from lightning_prune.report.rows import Row


def row_of(planned: PlannedVariant, plan: ComparisonPlan, results: Mapping[str, VariantResult]) -> Row:
    """The row of a variant.

    Args:
        planned: The variant.
        plan: The plan that it is part of.
        results: Variant -> result of its validation, dense included.
    """
    result, dense = results.get(planned.variant), results[DENSE_NAME]
    figures: dict[str, Any] = {**_schedule_columns(planned, plan.dense_tokens), **_latency_columns(planned.timing)}
    if result is not None:
        figures |= _logged_columns(result.metrics)
        if planned.variant != DENSE_NAME:
            figures |= paired_columns(dense.predictions, result.predictions)
    return Row(
        variant=planned.variant,
        method=planned.method,
        int8=planned.int8,
        target_speedup=planned.target_speedup,
        **figures,
        joules_per_image=planned.joules_per_image,
        watts=planned.watts,
        note=planned.note,
        images=result.images if result is not None else 0,
        **{name: plan.context[name] for name in ("device", "batch_size", "precision")},
        runtime=plan.context.get("runtime", ""),
    )


def paired_columns(dense: Predictions | None, variant: Predictions | None) -> dict[str, float]:
    """The columns that compare a variant with dense image by image; empty where that cannot be done.

    Args:
        dense: Predictions of the dense model, or None where they are not known.
        variant: Predictions of the variant.
    """
    if dense is None or variant is None or dense.labels != variant.labels:
        return {}
    columns = {"agreement": agreement(dense.predicted, variant.predicted)}
    if dense.labelled:
        change, low, high = paired_difference(dense.correct, variant.correct)
        columns |= {"top1_change": change, "top1_low": low, "top1_high": high}
    return columns


def _schedule_columns(planned: PlannedVariant, dense_tokens: int) -> dict[str, Any]:
    schedule = planned.schedule
    if schedule is not None:
        block = " ".join(map(str, schedule.reducing))
        return {"block": block, "removed": schedule.total_removed, "tokens": schedule.tokens(dense_tokens)[-1]}
    if planned.method in ("", INT8_NAME) and planned.timing is not None:
        return {"removed": 0, "tokens": dense_tokens}
    return {}


def _latency_columns(timing: LatencyStats | None) -> dict[str, float | None]:
    if timing is None:
        return {}
    return {
        "latency_ms": timing.milliseconds,
        "latency_p90_ms": timing.p90_ms,
        "latency_spread": timing.spread,
        "speedup": 1 / timing.ratio,
        "speedup_spread": timing.ratio_spread / timing.ratio**2,
    }


def _logged_columns(metrics: Mapping[str, float]) -> dict[str, float | None]:
    names = ("top1", "top5", "throughput", "throughput_end_to_end")
    return {name: metrics.get(f"val/{name}") for name in names}
