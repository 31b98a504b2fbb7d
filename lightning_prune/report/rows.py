"""The rows of a comparison: their columns, which of them belong together, and which figure ranks them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, NamedTuple

from lightning_prune._utils.formatting import percent, points
from lightning_prune.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of a comparison. The attributes are the columns of `results.csv`; what is not known is None.

    Attributes:
        variant: Its name; `dense` is the unpruned model.
        method: The reduction; empty for dense, `int8` where nothing is pruned.
        top1: Share of images whose best class is right, in [0, 1]; None where the module does not log it.
        top1_change: Difference to dense in the share of right images, on the same images.
        speedup: Latency of dense, in the same runtime and precision, over that of this variant: the median over rounds
            in which both ran.
        latency_ms: Median time of the transformer on one batch, from one interleaved run of all variants.
        latency_p90_ms: 90th percentile of these times.
        runtime: What executed the model, such as `torch` or `torch.compile:mode=blocks`.
        precision: Of the computation.
        peak_memory_mib: MiB of weights, and of activations of a batch that exist at the same time, in PyTorch without
            compilation.
        gmacs: 10^9 multiply-accumulates of an image.
        speedup_vs_eager: Latency of dense in float32 and PyTorch without compilation over that of this variant.
        metric: What the module itself logs, where it logs no top-1; None where it does.
        metric_change: Difference to dense, in the same runtime, in that metric.
        metric_name: Its name, such as `val/accuracy`; empty where there is none.
        metric_low: Lower end of the 95% interval of `metric_change`, where the metric of each image is known.
        metric_high: Upper end.
        int8: Whether its linear layers ran in 8 bits.
        target_speedup: The speed-up that its schedule was planned for.
        block: The reducing blocks; empty for dense.
        removed: R, tokens removed in all.
        tokens: Tokens that leave the last reducing block.
        top1_low: Lower end of the 95% interval of `top1_change`.
        top1_high: Upper end.
        top5: Share of images with the right class among the best five.
        agreement: Share of images with the same best class as dense.
        worst_class: The class that loses most against dense; empty where nobody asked for changes of classes.
        worst_class_change: Difference to dense in the share of right images of that class.
        worst_group: The group of images with the lowest accuracy; empty where the module reports none.
        worst_group_accuracy: Share of its images whose best class is right.
        worst_group_change: Difference to the accuracy of dense in its own worst group, which may be another.
        worst_group_images: How many images the worst group has.
        latency_low_ms: Lower quartile of the latencies; None where it is not known, as after fewer than three rounds.
        latency_high_ms: Upper quartile.
        latency_spread: Half the distance between the quartiles of the latencies; None after fewer than three rounds.
        speedup_spread: Half the distance between the quartiles of the speed-up; None after fewer than three rounds.
        throughput: Images a second in forward during validation, which runs after `latency_ms` was timed and may find
            the machine faster or slower. Of several processes their images together, over the time of the slowest;
            `latency_ms` is that of rank 0 alone.
        throughput_end_to_end: Images a second of the whole loop, loading included; dense, which comes first, pays for
            cold file caches.
        joules_per_image: Energy of an image; None where the device has no counter.
        watts: Mean power meanwhile.
        images: Images validated.
        device: What it ran on.
        batch_size: Images in a batch.
        note: A remark, such as why the row has no figures.

    Example:
        >>> from lightning_prune.report.rows import Row
        >>> Row.from_dict({"variant": "pomt 1.5x", "method": "pomt", "top1": float("nan"), "unknown": 1}).top1
    """

    variant: str = ""
    method: str = ""
    top1: float | None = None
    top1_change: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None
    latency_p90_ms: float | None = None
    runtime: str = ""
    precision: str = ""
    peak_memory_mib: float | None = None
    gmacs: float | None = None
    speedup_vs_eager: float | None = None
    metric: float | None = None
    metric_change: float | None = None
    metric_name: str = ""
    metric_low: float | None = None
    metric_high: float | None = None
    int8: bool = False
    target_speedup: float | None = None
    block: str = ""
    removed: int | None = None
    tokens: int | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    top5: float | None = None
    agreement: float | None = None
    worst_class: str = ""
    worst_class_change: float | None = None
    worst_group: str = ""
    worst_group_accuracy: float | None = None
    worst_group_change: float | None = None
    worst_group_images: int | None = None
    latency_low_ms: float | None = None
    latency_high_ms: float | None = None
    latency_spread: float | None = None
    speedup_spread: float | None = None
    throughput: float | None = None
    throughput_end_to_end: float | None = None
    joules_per_image: float | None = None
    watts: float | None = None
    images: int | None = None
    device: str = ""
    batch_size: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, in the order of the columns."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """The row that `to_dict` described; a figure that is missing, not finite or of another type is None."""
        known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(cls)}
        text = {name: "" if known[name] is None else str(known[name]) for name in _TEXT}
        figures: dict[str, Any] = {name: number(value) for name, value in known.items()}
        return cls(**{**figures, **text, "int8": known["int8"] is True})


_TEXT = (
    *("variant", "method", "runtime", "precision", "metric_name", "block"),
    *("worst_class", "worst_group", "device", "note"),
)
OF_CLASSES = ("worst_class", "worst_class_change")
"""Columns that are written only where changes of classes were asked for."""
OF_GROUPS = ("worst_group", "worst_group_accuracy", "worst_group_change", "worst_group_images")
"""Columns that are written only where the accuracy of groups of images is known."""


# Words in the name of a metric that is better the lower it is.
_LOWER = {"loss", "error", "err", "mse", "rmse", "mae", "nll", "bce", "perplexity", "ece", "fid", "distance", "regret"}


class Score(NamedTuple):
    """The figure that ranks the rows.

    Attributes:
        key: Its column.
        label: What people call it.
        is_share: Whether it is a share in [0, 1], which is shown as a percentage.
        lower_is_better: Whether the lowest is the best.
    """

    key: str
    label: str
    is_share: bool = True
    lower_is_better: bool = False

    @property
    def scale(self) -> float:
        """What the figure is multiplied by where it is drawn."""
        return 100.0 if self.is_share else 1.0

    def of(self, row: Row) -> float | None:
        """The figure of a row, None where it is not known."""
        return number(getattr(row, self.key))

    def rank(self, row: Row) -> float | None:
        """The figure with the sign with which the highest is the best; None where it is not known."""
        figure = self.of(row)
        return -figure if figure is not None and self.lower_is_better else figure

    def text(self, figure: float | None) -> str:
        """The figure as people read it.

        Example:
            >>> TOP1.text(0.931), metric_score("val/loss").text(0.1234)
            ('93.10%', '0.1234')
        """
        if self.is_share or figure is None:
            return percent(figure)
        return f"{figure:.4g}"

    def change_text(self, change: float | None) -> str:
        """A difference of two such figures: of shares in points, else as it is, with a sign.

        Example:
            >>> TOP1.change_text(-0.0055), metric_score("val/loss").change_text(0.0123)
            ('-0.55', '+0.0123')
        """
        if self.is_share or change is None:
            return points(change)
        return f"{change:+.3g}"


TOP1 = Score("top1", "top-1")
AGREEMENT = Score("agreement", "agreement with dense")


def metric_score(name: str) -> Score:
    """The score of a metric that a module logs; by its name a loss or an error is better the lower it is.

    Args:
        name: As the module logs it.

    Example:
        >>> metric_score("val/loss").lower_is_better, metric_score("val/MeanAveragePrecision").lower_is_better
        (True, False)
    """
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return Score("metric", name or "metric", is_share=False, lower_is_better=not _LOWER.isdisjoint(words))


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """The rows of a document that `compare` wrote.

    Raises:
        DataError: If it has none.
    """
    rows = document.get("rows")
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(f"`document` must hold the rows of a comparison under 'rows', got {rows!r}.")
    return [Row.from_dict(row) for row in rows]


def processes_of(document: Mapping[str, Any]) -> int:
    """How many processes shared the images of a comparison; 1 where the document does not say.

    Args:
        document: What `compare` writes as `results.json`.
    """
    trainer = (document.get("config") or {}).get("trainer") or {}
    return int(trainer.get("processes") or 1)


def series_name(row: Row) -> str:
    """The line of a plot that the row is on: a method, `int8`, or both; empty for dense.

    Where there are several runtimes, names of variants end with theirs, and so do the lines.

    Example:
        >>> series_name(Row(variant="pomt+int8", method="pomt", int8=True)), series_name(Row(variant="dense"))
        ('pomt+int8', '')
        >>> series_name(Row(variant="tome 2x [torch.compile]", method="tome", runtime="torch.compile"))
        'tome [torch.compile]'
    """
    method = row.method.removesuffix("+int8")
    parts = [] if method in ("", "dense", "int8") else [method]
    name = "+".join([*parts, "int8"] if row.int8 or method == "int8" else parts)
    return f"{name}{runtime_suffix(row)}" if name else ""


def runtime_suffix(row: Row) -> str:
    """The end of the name of a variant that says its runtime; empty where there is one runtime only."""
    suffix = f" [{row.runtime}]"
    return suffix if row.variant.endswith(suffix) else ""


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Line -> its rows, in the order in which they came; without dense, but with the dense of further runtimes."""
    found: dict[str, list[Row]] = {}
    dense = dense_of(rows)
    for row in rows:
        if row is not dense:
            found.setdefault(series_name(row) or f"dense{runtime_suffix(row)}", []).append(row)
    return found


def dense_of(rows: Sequence[Row], like: Row | None = None) -> Row | None:
    """The row of the unpruned model, if there is one: in the runtime of a row, or in the first.

    Args:
        rows: Of a comparison.
        like: The row; None for the first runtime.
    """
    suffix = None if like is None else runtime_suffix(like)
    return next((row for row in rows if not series_name(row) and suffix in (None, runtime_suffix(row))), None)


def score_of(rows: Sequence[Row]) -> Score | None:
    """Top-1 where any row knows it, else the metric of the module, else the agreement with dense, else None."""
    named = next((row.metric_name for row in rows if row.metric is not None), None)
    scores = [TOP1, *([metric_score(named)] if named is not None else []), AGREEMENT]
    return next((score for score in scores if any(score.of(row) is not None for row in rows)), None)


def by_target(rows: Sequence[Row], score: Score | None) -> dict[float | None, list[Row]]:
    """Target speed-up -> its rows, best first; the rows without a target come first, as they came."""
    targets = sorted({row.target_speedup for row in rows if row.target_speedup is not None})
    groups: dict[float | None, list[Row]] = {None: [row for row in rows if row.target_speedup is None]}
    for target in targets:
        groups[target] = ranked([row for row in rows if row.target_speedup == target], score)
    return {target: group for target, group in groups.items() if group}


def number(value: Any) -> float | None:
    """The figure, or None where it is none, or not finite."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return value if real else None


def ranked(rows: Sequence[Row], score: Score | None) -> list[Row]:
    """Best first; rows without the figure last, in the order in which they came."""
    if score is None:
        return list(rows)
    return sorted(rows, key=lambda row: _or_last(score.rank(row)), reverse=True)


def placed(row: Row, score: Score) -> bool:
    """Whether the row has both a latency and the figure, so that it has a place in a plot."""
    return number(row.latency_ms) is not None and score.of(row) is not None


def front_of(rows: Sequence[Row], score: Score) -> list[Row]:
    """The rows that no other is at least as good as in both latency and the figure, fastest first.

    Example:
        >>> rows = [Row(latency_ms=ms, top1=share) for ms, share in ((9, 0.9), (5, 0.8), (7, 0.7), (6, 0.85))]
        >>> [row.latency_ms for row in front_of(rows, TOP1)]
        [5, 6, 9]
    """
    front: list[Row] = []
    best = float("-inf")
    known = [(row.latency_ms or 0.0, score.rank(row) or 0.0, row) for row in rows if placed(row, score)]
    for _, figure, row in sorted(known, key=lambda entry: (entry[0], -entry[1])):
        if figure > best:
            front.append(row)
            best = figure
    return front


def change_of(row: Row, dense: Row | None, score: Score = TOP1) -> float | None:
    """The change against dense: in top-1 as measured on the same images, else the difference of the two figures.

    Args:
        row: The row.
        dense: The row of dense in the same runtime.
        score: What ranks the rows: of the metric of the module it is the change in that.
    """
    if score.key == "metric":
        return row.metric_change
    if row.top1_change is not None or row.top1 is None or dense is None or dense.top1 is None:
        return row.top1_change
    return row.top1 - dense.top1


def interval_of(row: Row) -> tuple[float, float] | None:
    """The 95% interval of the change, if it is known."""
    return None if row.top1_low is None or row.top1_high is None else (row.top1_low, row.top1_high)


def missed(row: Row) -> bool:
    """Whether the latency is above the row's target by more than the spread of the speed-up, and than 0.5% of dense."""
    target, speedup = row.target_speedup, row.speedup
    if target is None or speedup is None or not speedup > 0:
        return False
    near = 1 / speedup <= 1 / target + 0.005  # which the planning counts as reached
    return not near and speedup + (row.speedup_spread or 0.0) < target


def _or_last(figure: float | None) -> float:
    return float("-inf") if figure is None else figure
