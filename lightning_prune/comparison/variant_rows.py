"""The rows of a comparison, from what was planned, timed and validated."""

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from lightning_prune._utils.formatting import percent
from lightning_prune.comparison.class_changes import ClassChange, changes_by_class
from lightning_prune.comparison.paired_statistics import agreement, paired_difference, paired_mean_difference
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant
from lightning_prune.comparison.predictions import Predictions
from lightning_prune.comparison.requests import INT8_NAME
from lightning_prune.comparison.resume import VariantResult
from lightning_prune.patching.exact_tail import EXACT
from lightning_prune.profiling import LatencyStats
from lightning_prune.profiling.model_identity import UNKNOWN
from lightning_prune.report.rows import Row, metric_score

# Words in the names of figures that say nothing about the quality of predictions.
_OTHER = {"throughput", "latency", "time", "seconds", "lr", "epoch", "step", "energy", "joules", "watts", "memory"}

_GROUP = "val/group_"
_ROUNDING = 1e-4  # by which two computations of the same accuracy may differ


def row_of(
    planned: PlannedVariant,
    plan: ComparisonPlan,
    results: Mapping[str, VariantResult],
    note: str = "",
    classes: Mapping[str, Sequence[ClassChange]] | None = None,
    metric: str | None = None,
) -> Row:
    """The row of a variant.

    Args:
        planned: The variant.
        plan: The plan that it is part of.
        results: Variant -> result of its validation, dense included.
        note: A remark on all figures, for the row of dense.
        classes: Variant -> the changes of its classes, the worst first; None where nobody asked for them.
        metric: The metric of each image that was asked for; None for what the module logs.
    """
    result, dense = results.get(planned.variant), results[plan.dense_of(planned).variant]
    notes = [planned.note, _rounds_note(planned.timing), note if planned.is_dense else ""]
    figures: dict[str, Any] = {**_schedule_columns(planned, plan.dense_tokens), **_latency_columns(planned.timing)}
    if result is not None:
        figures |= _logged_columns(result.metrics)
        figures |= group_columns(result.metrics, None if planned.is_dense else dense.metrics)
        name = own_metric(dense.metrics) if metric is None else metric
        if not planned.is_dense:
            figures |= paired_columns(dense, result)
            figures |= _worst_class((classes or {}).get(planned.variant, ()))
        if result.broken:
            notes.append(result.broken)
        elif metric is None and (planned.is_dense or not unpaired_reason(dense)):
            notes.append(_unpaired_note(result, bool(name)))
        if name:
            figures |= dict.fromkeys(("top1_change", "top1_low", "top1_high"))
            figures |= _metric_columns(name, result.metrics, None if planned.is_dense else dense.metrics)
            if dense.values and result.values and not planned.is_dense and len(dense.values) == len(result.values):
                _, low, high = paired_mean_difference(dense.values, result.values)
                figures |= {"metric_low": low, "metric_high": high}
    return Row(
        variant=planned.variant,
        method=planned.method,
        int8=planned.int8,
        target_speedup=planned.target_speedup,
        **figures,
        gmacs=planned.gmacs,
        peak_memory_mib=planned.peak_memory_mib,
        joules_per_image=planned.joules_per_image,
        watts=planned.watts,
        note="; ".join(filter(None, notes)),
        images=result.images if result is not None else 0,
        **{name: plan.context[name] for name in ("device", "batch_size", "precision")},
        runtime=UNKNOWN if plan.context.get("runtime") == UNKNOWN else planned.runtime,
        speedup_vs_eager=planned.speedup_vs_eager,
    )


def own_metric(metrics: Mapping[str, float]) -> str:
    """The metric of a module that logs no top-1: the first that it logs which is no loss, else the first.

    Latencies and rates, counters and settings are no metrics.

    Args:
        metrics: What the module logged for dense, in its order.

    Returns:
        The name; empty where the module logs `val/top1`, or nothing that measures its quality.

    Example:
        >>> own_metric({"val/loss": 1.2, "val/accuracy": 0.8, "val/throughput": 90.0}), own_metric({"val/top1": 0.9})
        ('val/accuracy', '')
    """
    if "val/top1" in metrics:
        return ""
    names = [name for name in metrics if _OTHER.isdisjoint(re.findall(r"[a-z]+", name.lower()))]
    return next((name for name in names if not metric_score(name).lower_is_better), next(iter(names), ""))


def unpaired_reason(result: VariantResult) -> str:
    """Why the images of a validation cannot be compared with those of another; empty where they can.

    The accuracy that the module logs must be that of the recorded classes and labels. Where it is not, one of the two
    is of other images, of features instead of logits, or of other labels.

    Args:
        result: The outcome of the validation.
    """
    found, logged = result.predictions, result.metrics.get("val/top1")
    if found is None or not found.labelled or logged is None:
        return result.missing
    own = sum(found.correct) / len(found.correct)
    if abs(own - logged) <= _ROUNDING:
        return result.missing
    return f"the module logs a top-1 of {percent(logged)}, the recorded classes and labels give {percent(own)}"


def _unpaired_note(result: VariantResult, has_own_metric: bool) -> str:
    reason = unpaired_reason(result)
    only_labels = result.predictions is not None and not result.predictions.labelled
    if not reason or (only_labels and has_own_metric):
        return ""
    return f"no {'change in top-1' if only_labels else 'change and no agreement'} by the same images: {reason}"


def paired_columns(dense: VariantResult, variant: VariantResult) -> dict[str, float]:
    """The columns that compare a variant with dense image by image; empty where that cannot be done.

    Args:
        dense: The outcome of the dense model.
        variant: That of the variant.
    """
    pair = _paired(dense, variant)
    if pair is None:
        return {}
    first, second = pair
    columns = {"agreement": agreement(first.predicted, second.predicted)}
    if first.labelled:
        change, low, high = paired_difference(first.correct, second.correct)
        columns |= {"top1_change": change, "top1_low": low, "top1_high": high}
    return columns


def paired_classes(dense: VariantResult, variant: VariantResult, names: Mapping[int, str]) -> tuple[ClassChange, ...]:
    """The change of each class, the worst first; none where images or their right classes cannot be compared.

    Args:
        dense: The outcome of the dense model.
        variant: That of the variant.
        names: Index -> name of a class, where it is known.
    """
    pair = _paired(dense, variant)
    return changes_by_class(*pair, names) if pair is not None and pair[0].labelled else ()


def _paired(dense: VariantResult, variant: VariantResult) -> tuple[Predictions, Predictions] | None:
    """The predictions of both where they are of the same images; None where that is not known."""
    first, second = dense.predictions, variant.predictions
    if first is None or second is None or first.labels != second.labels:
        return None
    if first.labelled and (unpaired_reason(dense) or unpaired_reason(variant)):
        return None
    return first, second


def _worst_class(changes: Sequence[ClassChange]) -> dict[str, Any]:
    return {"worst_class": changes[0].name, "worst_class_change": changes[0].change} if changes else {}


def group_columns(metrics: Mapping[str, float], dense: Mapping[str, float] | None) -> dict[str, Any]:
    """The columns of the worst group of images; none where the module does not log it.

    Args:
        metrics: What the module logged for a variant: `val/worst_group`, and `val/group_NAME` where it tells groups.
        dense: The same for dense; None where the variant is dense.

    Example:
        >>> metrics = {"val/worst_group": 0.6, "val/group_land": 0.9, "val/group_water": 0.6}
        >>> group_columns(metrics, {"val/worst_group": 0.75})["worst_group"]
        'water'
    """
    worst = metrics.get("val/worst_group")
    if worst is None or not isfinite(worst):
        return {}
    groups = {name.removeprefix(_GROUP): share for name, share in metrics.items() if name.startswith(_GROUP)}
    images, before = metrics.get("val/worst_group_images"), None if dense is None else dense.get("val/worst_group")
    return {
        "worst_group": next((name for name, share in groups.items() if share == worst), ""),
        "worst_group_accuracy": worst,
        "worst_group_change": None if before is None else worst - before,
        "worst_group_images": None if images is None else int(images),
    }


def _schedule_columns(planned: PlannedVariant, dense_tokens: int) -> dict[str, Any]:
    schedule = planned.schedule
    if schedule is not None:
        block = " ".join(map(str, schedule.reducing))
        return {"block": block, "removed": schedule.total_removed, "tokens": schedule.tokens(dense_tokens)[-1]}
    if planned.method in ("", EXACT, INT8_NAME) and planned.timing is not None:
        return {"removed": 0, "tokens": dense_tokens}
    return {}


def _rounds_note(timing: LatencyStats | None) -> str:
    """Says so where a latency is of too few rounds to have an interval."""
    if timing is None or timing.has_interval:
        return ""
    return f"timed in {timing.rounds} round{'s' * (timing.rounds != 1)} only"


def _latency_columns(timing: LatencyStats | None) -> dict[str, float | None]:
    if timing is None:
        return {}
    columns = {"latency_ms": timing.milliseconds, "latency_p90_ms": timing.p90_ms, "speedup": 1 / timing.ratio}
    if timing.has_interval:  # a single round has no spread, which is not the same as none
        columns |= {
            "latency_low_ms": timing.low_ms,
            "latency_high_ms": timing.high_ms,
            "latency_spread": timing.spread,
            "speedup_spread": timing.ratio_spread / timing.ratio**2,
        }
    return columns


def _metric_columns(
    name: str, metrics: Mapping[str, float], dense: Mapping[str, float] | None
) -> dict[str, float | str | None]:
    value = metrics.get(name)
    change = None if dense is None or value is None else value - dense[name]
    return {"metric": value, "metric_change": change, "metric_name": name}


def _logged_columns(metrics: Mapping[str, float]) -> dict[str, float | None]:
    names = ("top1", "top5", "throughput", "throughput_end_to_end")
    return {name: metrics.get(f"val/{name}") for name in names}
