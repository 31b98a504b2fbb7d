"""One row of the table, and where its figures come from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_prune.comparing.outcomes import Outcomes
from lightning_prune.profiling import Timing
from lightning_prune.statistics import agreement, paired_difference


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of the table; what is not known is None.

    Attributes:
        variant: Its name; `dense` is the unpruned model.
        method: The reduction; empty for dense, `int8` where nothing is pruned.
        int8: Whether its linear layers ran in 8 bits.
        target: The speed-up that its schedule was planned for.
        block: The reducing blocks; empty for dense.
        removed: R, tokens removed in all.
        tokens: Tokens that leave the last reducing block.
        top1: Share of images whose best class is right; None where the module does not log it.
        top1_change: Difference to dense in the share of right images, by the same images.
        top1_low: Lower end of its 95% interval (`lightning_prune.statistics.paired_interval`).
        top1_high: Upper end.
        top5: Share of images with the right class among the best five.
        agreement: Share of images with the same best class as dense.
        latency_ms: Median time of the transformer on one batch, from one interleaved run of all variants.
        latency_spread: Half the distance between the quartiles of those times.
        speedup: Dense latency over this one, the median over rounds in which both ran.
        speedup_spread: Half the distance between its quartiles.
        throughput: Images a second in forward during validation.
        throughput_end_to_end: Images a second of the whole loop, loading included; dense, which comes first, pays for
            cold file caches.
        joules_per_image: Energy of an image; None where the device has no counter.
        watts: Mean power meanwhile.
        images: Images validated.
        device: What it ran on.
        batch_size: Images in a batch.
        precision: Of the computation.
        note: What is to be said of the row, as why it has no figures.
    """

    variant: str
    method: str = ""
    int8: bool = False
    target: float | None = None
    block: str = ""
    removed: int | None = None
    tokens: int | None = None
    top1: float | None = None
    top1_change: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    top5: float | None = None
    agreement: float | None = None
    latency_ms: float | None = None
    latency_spread: float | None = None
    speedup: float | None = None
    speedup_spread: float | None = None
    throughput: float | None = None
    throughput_end_to_end: float | None = None
    joules_per_image: float | None = None
    watts: float | None = None
    images: int = 0
    device: str = ""
    batch_size: int = 0
    precision: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, in the order of the columns."""
        return asdict(self)


def timed(timing: Timing | None) -> dict[str, float]:
    """The columns that a timing fills."""
    if timing is None:
        return {}
    return {
        "latency_ms": timing.milliseconds,
        "latency_spread": timing.spread,
        "speedup": 1 / timing.ratio,
        "speedup_spread": timing.ratio_spread / timing.ratio**2,
    }


def flat(metrics: Any) -> dict[str, float]:
    """What `trainer.validate` returned, as plain numbers; of several dataloaders the first counts."""
    return {name: float(value) for name, value in dict(metrics[0]).items()} if metrics else {}


def logged(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The columns that a validation fills, from what the module logs."""
    names = ("top1", "top5", "throughput", "throughput_end_to_end")
    return {name: metrics.get(f"val/{name}") for name in names}


def compared(dense: Outcomes | None, variant: Outcomes | None) -> dict[str, float]:
    """The columns that pairs fill: what dense and a variant say of the same images; none where they are not the same.

    Args:
        dense: What dense said of each image, or None where that is not known.
        variant: What the variant said.
    """
    if dense is None or variant is None or dense.labels != variant.labels:
        return {}
    columns = {"agreement": agreement(dense.predicted, variant.predicted)}
    if dense.labelled:
        change, low, high = paired_difference(dense.right, variant.right)
        columns |= {"top1_change": change, "top1_low": low, "top1_high": high}
    return columns


def surroundings(context: Mapping[str, Any], images: int) -> dict[str, Any]:
    """The columns that are the same in all rows."""
    keys = ("device", "batch_size", "precision")
    return {key: context[key] for key in keys} | {"images": images}
