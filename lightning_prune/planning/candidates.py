"""Candidates: schedules that are considered, and where they come from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from torch import nn

from lightning_prune.planning.objectives import Objective
from lightning_prune.profiling import Estimate, LatencyStats, Variant
from lightning_prune.profiling.model_variants import WeightTransform
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes.base import Runtime
from lightning_prune.schedule import Schedule

T = TypeVar("T")
MIXED = "mixed"
"""What stands in place of a method where blocks have different ones, which the schedule names."""


def pareto_front(items: Iterable[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    """The items that no other beats in both values, in ascending order of the first.

    Of items with equal values the first stays.

    Args:
        items: In any order.
        key: Two values of an item; both are better if they are smaller.

    Example:
        >>> from lightning_prune.planning.candidates import pareto_front
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
    """A schedule of one or more methods that is considered.

    Attributes:
        method: Name of the method, with the settings in which it differs from another of the same name; `"mixed"` if
            blocks have different ones.
        reduction: The method; None if no token is removed, or the schedule names a method for each block.
        schedule: Tokens that each block removes.
        ratio: Predicted latency over that of the dense model.
        cost: Predicted divergence from the dense outputs, per image; 0 where it is not predicted.
        accuracy: The proxy relative to dense, if it was measured.
        timing: The latency, if it was measured in a run together with the dense model.
        weights: Makes the weights to run with; None keeps the model's own.
        runtime: What executes the model, where that is not the same for all candidates.
        accuracy_stderr: Standard error of the proxy over the calibration images; infinite where it is not known.
        quantized: Whether the runtime quantizes the model, which is not dense then, even if no token is removed.
        tail: As of `lightning_prune.patch`, for how it is run.
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
    tail: bool | None = None

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What identifies the candidate: its methods, in a runtime where one is named, and removed tokens."""
        method = f"{self.method} ({self.schedule.method_label})" if self.is_mixed else self.method
        return method if self.runtime is None else f"{method} [{self.runtime.name}]", self.schedule.removed

    @property
    def is_mixed(self) -> bool:
        """Whether blocks have different methods, which the schedule names."""
        return isinstance(self.schedule.method, tuple)

    @property
    def variant(self) -> Variant:
        """How to run it."""
        if not self.schedule.total_removed:
            return Variant(weights=self.weights, runtime=self.runtime)
        return Variant(self.reduction, self.schedule, self.weights, self.runtime, self.tail)

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
            **({"methods": self.schedule.method_label} if self.is_mixed else {}),
            "removed": list(self.schedule.removed),
            "ratio": self.ratio,
            "cost": self.cost,
            "accuracy": self.accuracy,
            "accuracy_stderr": self.accuracy_stderr if isfinite(self.accuracy_stderr) else None,
            "measured_ratio": None if self.timing is None else self.timing.ratio,
        }


CandidateKey = tuple[str, tuple[int, ...]]
Timings = tuple[LatencyStats, Mapping[CandidateKey, LatencyStats]]
"""Timing of the dense model, and of each candidate by its key, from one interleaved run."""
TimeCandidates = Callable[[Sequence[Candidate]], Timings]


class Proposal(NamedTuple):
    """The best candidate of a source by its predictions.

    Attributes:
        candidate: The candidate; dense or the fastest one if none is better or none meets the objective.
        reason: Why it is dense, or why the objective cannot be met; empty otherwise.
        feasible: Whether the objective is predicted to be met, or no source would gain anything.
    """

    candidate: Candidate
    reason: str = ""
    feasible: bool = True


class CandidateSource(Protocol):
    """Proposes candidates and learns from their timings: one method, for example."""

    label: str

    def propose(self, objective: Objective, dense_ms: float, deadline: float) -> Proposal | None:
        """The best candidate by what is known; None if the source has nothing to add to those before it.

        Args:
            objective: What makes one candidate better than another.
            dense_ms: Latency of the dense model at present.
            deadline: On the clock of the search; nothing more is measured after it than one candidate needs.
        """
        ...

    def fastest(self) -> Candidate:
        """The candidate with the smallest predicted latency."""
        ...

    def observe(self, candidate: Candidate, timing: LatencyStats) -> None:
        """Corrects the predictions by a timing."""
        ...

    def accuracy(self, candidate: Candidate) -> Estimate:
        """The proxy of a proposed candidate relative to dense; 1 for dense."""
        ...
