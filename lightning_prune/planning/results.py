"""The results of planning: the candidates that were considered, and the plan with the schedule to deploy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import nn

from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.planning.objectives import Objective
from lightning_prune.profiling import Estimate, LatencyProfile, LatencyStats, Variant
from lightning_prune.profiling.latency_profile import SAVING
from lightning_prune.profiling.model_variants import WeightTransform
from lightning_prune.reduction import Reduction, spec_of
from lightning_prune.runtimes.base import Runtime
from lightning_prune.schedule import Schedule

T = TypeVar("T")


def pareto_front(items: Iterable[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    """The items that no other beats in both values, in ascending order of the first.

    Of items with equal values the first stays.

    Args:
        items: In any order.
        key: Two values of an item, both of which are better if they are smaller.

    Example:
        >>> from lightning_prune.planning.results import pareto_front
        >>> pareto_front([(3, 1), (1, 3), (2, 2), (3, 2)], key=lambda pair: pair)
        [(1, 3), (2, 2), (3, 1)]
    """
    front: list[T] = []
    for item in sorted(items, key=key):
        if not front or key(item)[1] < key(front[-1])[1]:
            front.append(item)
    return front


@dataclass(frozen=True)
class Candidate:
    """A schedule of a method that is considered.

    Attributes:
        method: Name of the method, with the settings in which it differs from another of the same name.
        reduction: The method; None if no token is removed.
        schedule: Tokens that each block removes.
        ratio: Predicted latency over that of the dense model.
        cost: Predicted divergence from the dense outputs, per image; 0 where it is not predicted.
        accuracy: The proxy relative to dense, if it was measured.
        timing: The latency, if it was measured in a run together with the dense model.
        weights: Makes the weights to run with; None keeps the model's own.
        runtime: What executes the model, where that is not the same for all candidates.
        accuracy_stderr: Standard error of the proxy over the calibration images; infinite where it is not known.
        quantized: Whether the runtime quantizes the model, which is not dense then, even if no token is removed.
    """

    method: str
    reduction: Reduction | None
    schedule: Schedule
    ratio: float
    cost: float = 0.0
    accuracy: float | None = None
    timing: LatencyStats | None = None
    weights: Callable[[nn.Module], WeightTransform] | None = None
    runtime: Runtime | None = None
    accuracy_stderr: float = inf
    quantized: bool = False

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What identifies the candidate: method, in a runtime where one is named, and removed tokens."""
        method = self.method if self.runtime is None else f"{self.method} [{self.runtime.name}]"
        return method, self.schedule.removed

    @property
    def variant(self) -> Variant:
        """How to run it."""
        if self.reduction is None or not self.schedule.total_removed:
            return Variant(weights=self.weights, runtime=self.runtime)
        return Variant(self.reduction, self.schedule, self.weights, self.runtime)

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model itself."""
        return not self.schedule.total_removed and self.weights is None and not self.quantized

    def with_accuracy(self, estimate: Estimate) -> Self:
        """The candidate with its measured proxy."""
        return replace(self, accuracy=estimate.value, accuracy_stderr=estimate.stderr)

    @property
    def estimate(self) -> Estimate:
        """The proxy with its standard error; not a number where it was not measured."""
        return Estimate(nan if self.accuracy is None else self.accuracy, self.accuracy_stderr)

    @property
    def latency_ratio(self) -> float:
        """Latency over dense: measured if it was, else predicted."""
        return self.ratio if self.timing is None else self.timing.ratio

    def to_dict(self) -> dict[str, Any]:
        """The candidate as plain values."""
        return {
            "method": self.method,
            "removed": list(self.schedule.removed),
            "ratio": self.ratio,
            "cost": self.cost,
            "accuracy": self.accuracy,
            "accuracy_stderr": self.accuracy_stderr if isfinite(self.accuracy_stderr) else None,
            "measured_ratio": None if self.timing is None else self.timing.ratio,
        }


def no_gain(schedule: Schedule, dense_tokens: int, timing: LatencyStats) -> str | None:
    """Why a schedule is not worth using, in a sentence; None if it saves 2% or more, or removes nothing.

    Args:
        schedule: The schedule.
        dense_tokens: N.
        timing: Against dense.
    """
    if not schedule.total_removed or timing.ratio < 1 - SAVING:
        return None
    return (
        f"Timed against dense, the schedule that leaves {schedule.tokens(dense_tokens)[-1]} tokens takes "
        f"{100 * timing.ratio:.1f}% of its latency: nothing is gained."
    )


@dataclass(frozen=True)
class Plan:
    """A schedule to deploy, and what it was chosen from.

    Attributes:
        schedule: Tokens that each block removes; it names its method and says what it was made on.
        method: The method as a spec: its name, and the settings that differ from its defaults.
        reduction: The method itself.
        objective: What was optimised.
        met: Whether the objective is met; False only for a budget that was missed.
        reason: Why this schedule, and for a budget that was missed the best that can be had.
        profile: The latency curve that was planned on.
        proxy: What the accuracy estimate measures.
        accuracy: The proxy of the schedule relative to dense.
        predicted_ratio: Predicted latency of the schedule over dense.
        dense: LatencyStats of the dense model, from a run together with the schedule, or from the last run before;
            None if nothing was timed.
        pruned: LatencyStats of the schedule.
        front: All candidates that no other of their method beats, and those that were timed; dense first.
        label: Name of the method in `front`.
        images: Number of calibration images that the proxy was measured on.
        sensitivity_images: Number of them that the sensitivity of the blocks was measured on.
        sensitivity_seconds: Time that the sensitivities of all methods took.
        seconds: Time that planning took, profiling included if no profile was given.
        accuracy_stderr: Standard error of the proxy over the calibration images; infinite where it is not known.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> images = torch.randn(2, 3, 224, 224)
        >>> plan = lp.plan(model, images, calibration=images, methods="topk", time_limit=2, verbose=False)
        >>> plan.front[0].schedule.removed, plan.front[0].accuracy
        ((0, 0), 1.0)
    """

    schedule: Schedule
    method: str
    reduction: Reduction
    objective: Objective
    met: bool
    reason: str
    profile: LatencyProfile
    proxy: str = ""
    accuracy: float = 1.0
    predicted_ratio: float = 1.0
    dense: LatencyStats | None = None
    pruned: LatencyStats | None = None
    front: tuple[Candidate, ...] = ()
    label: str = ""
    images: int = 0
    sensitivity_images: int = 0
    sensitivity_seconds: float = 0.0
    seconds: float = 0.0
    accuracy_stderr: float = 0.0

    @classmethod
    def of(
        cls,
        candidate: Candidate,
        reduction: Reduction,
        objective: Objective,
        met: bool,
        reason: str,
        profile: LatencyProfile,
        **more: Any,
    ) -> Self:
        """The plan that deploys a candidate.

        Args:
            candidate: What was chosen, its proxy and perhaps its timing included.
            reduction: The method.
            objective: What it was chosen by.
            met: Whether the objective is met.
            reason: Why it was chosen.
            profile: The latency curve.
            **more: Other attributes.
        """
        made_on = MeasurementSource.from_context(
            profile.context,
            objective=str(objective),
            dense_tokens=profile.dense_tokens,
            protocol=profile.protocol,
            proxy=more.get("proxy", ""),
        )
        spec = spec_of(reduction)
        return cls(
            schedule=Schedule(candidate.schedule.removed, spec, made_on),
            method=str(spec),
            reduction=reduction,
            objective=objective,
            met=met,
            reason=reason,
            profile=profile,
            accuracy=1.0 if candidate.accuracy is None else candidate.accuracy,
            accuracy_stderr=0.0 if candidate.is_dense else candidate.accuracy_stderr,
            predicted_ratio=candidate.ratio,
            pruned=candidate.timing,
            label=candidate.method,
            **more,
        )

    @property
    def dense_tokens(self) -> int:
        """N, tokens of the dense model."""
        return self.profile.dense_tokens

    @property
    def tokens(self) -> int:
        """Tokens that leave the last block."""
        return self.schedule.tokens(self.dense_tokens)[-1]

    @property
    def total_removed(self) -> int:
        """Tokens removed by all blocks together."""
        return self.schedule.total_removed

    @property
    def dense_ms(self) -> float:
        """Latency of the dense model: timed while planning if it was, else of the profile."""
        return self.dense.milliseconds if self.dense else self.profile.dense_ms

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """95% interval of the proxy over images like those of the calibration; None where it is not known."""
        return Estimate(self.accuracy, self.accuracy_stderr).interval

    @property
    def predicted_ms(self) -> float:
        """Predicted latency: the predicted ratio times `dense_ms`, since the machine may have changed its speed."""
        return self.predicted_ratio * self.dense_ms

    @property
    def latency_ms(self) -> float:
        """Latency of the schedule: measured if it was, else predicted."""
        return self.pruned.milliseconds if self.pruned else self.predicted_ms

    @property
    def speedup(self) -> float:
        """Dense latency over that of the schedule: from rounds in which both ran, else predicted."""
        return 1 / (self.pruned.ratio if self.pruned else self.predicted_ratio)

    def or_dense_if_slower(self) -> Self:
        """This plan, or one that removes nothing if the schedule was timed and saves less than 2%."""
        reason = None if self.pruned is None else no_gain(self.schedule, self.dense_tokens, self.pruned)
        if reason is None:
            return self
        return replace(
            self,
            schedule=Schedule([0] * self.schedule.depth, self.schedule.method, self.schedule.made_on),
            met=self.objective.dense_is_feasible(self.dense_ms),
            accuracy=1.0,
            accuracy_stderr=0.0,
            predicted_ratio=1.0,
            reason=reason,
            pruned=None,
        )

    def save(self, path: str | Path) -> Path:
        """Writes the schedule, as JSON if `path` ends in `.json` and as YAML otherwise; returns the path."""
        return self.schedule.save(path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "schedule": self.schedule.to_dict(),
            "method": self.method,
            "objective": str(self.objective),
            "met": self.met,
            "reason": self.reason,
            "proxy": self.proxy,
            "accuracy": self.accuracy,
            "accuracy_interval": None if self.accuracy_interval is None else list(self.accuracy_interval),
            "tokens": self.tokens,
            "removed": self.total_removed,
            "dense_ms": self.dense_ms,
            "latency_ms": self.latency_ms,
            "predicted_ms": self.predicted_ms,
            "speedup": self.speedup,
            "seconds": self.seconds,
            "images": self.images,
            "sensitivity_images": self.sensitivity_images,
            "sensitivity_seconds": self.sensitivity_seconds,
            "front": [candidate.to_dict() for candidate in self.front],
        }
