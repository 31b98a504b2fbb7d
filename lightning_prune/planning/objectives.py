"""Objectives: from the latency and the accuracy of each candidate to the one to deploy."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import NormalDist
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_prune._utils.formatting import three_digits
from lightning_prune._utils.validation import check, check_above, check_between, check_half_open
from lightning_prune.errors import ArgumentError
from lightning_prune.profiling import Estimate, LatencyStats

Column = NDArray[np.float64]
RATIO_TOLERANCE = 0.005  # share by which a latency may exceed a budget and still meet it: timers are no more exact
_TOLERANCE = 0.005  # loss of the proxy, with other weights, that is no reason to plan again
_ACCURACY_ROUNDING = 1e-6  # a proxy is a mean of float32 probabilities: a smaller difference is no loss


class Objective(ABC):
    """The value of a candidate. Higher is better; `-inf` marks a candidate that may not be chosen.

    **The last element of every array is the dense model.** Latencies are judged relative to it, and it may always be
    chosen under an accuracy budget.

    Attributes:
        wants_most_accurate: Whether the most accurate of the candidates that meet the budget is the best, however fast.
    """

    wants_most_accurate: ClassVar[bool] = False

    @abstractmethod
    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """The value of every candidate.

        Args:
            milliseconds: (candidates,) latency, dense last.
            accuracy: (candidates,) proxy relative to dense: 1 is as good as dense.
        """

    def infeasible_reason(self, milliseconds: Column) -> str | None:
        """Why no candidate meets the budget, with the best that can be had; None if one does, or there is no budget.

        Args:
            milliseconds: (candidates,) latency, dense last.
        """
        return None

    def violation(self, timing: LatencyStats) -> float:
        """The share by which a timed candidate is slower than the budget; <= 0 if it meets the budget.

        Args:
            timing: Latency of the candidate, from a run together with the dense model.
        """
        return 0.0

    def latency_text(self, milliseconds: float, p90_ms: float | None = None) -> str:
        """The latency that the objective is about, in words.

        Args:
            milliseconds: The median.
            p90_ms: The 90th percentile; None where it is not known.
        """
        return f"{three_digits(milliseconds)} ms"

    def with_tail_of(self, dense: LatencyStats) -> "Objective":
        """This objective for a model whose latencies vary as those of a timed dense model; most do not depend on it."""
        return self

    def dense_is_feasible(self, dense_ms: float) -> bool:
        """Whether removing nothing meets the objective.

        Args:
            dense_ms: Latency of the dense model.
        """
        return bool(self.score(np.array([dense_ms]), np.ones(1))[0] > -inf)

    def tolerates(self, accuracy: Estimate, planned: float) -> bool:
        """Whether a schedule that was planned before is still good enough with other weights.

        Args:
            accuracy: The proxy of the schedule with the present weights, relative to dense.
            planned: The proxy when it was planned.
        """
        return accuracy.value >= planned - _TOLERANCE

    def judged(self, accuracy: Sequence[Estimate]) -> Column:
        """(candidates,) the accuracies by which candidates are judged: as measured, unless a confidence is asked for.

        Args:
            accuracy: The proxy of each candidate relative to dense.
        """
        return np.array([estimate.value for estimate in accuracy])

    def score_feasible(self, milliseconds: Column, accuracy: Column) -> Column:
        """The value of candidates that are known to meet a latency budget.

        Args:
            milliseconds: (candidates,) latency, dense last.
            accuracy: (candidates,) proxy relative to dense.
        """
        return self.score(milliseconds, accuracy)

    def best(self, milliseconds: Column, accuracy: Column) -> int:
        """Index of the best candidate; of equally good ones the last, which removes the fewest tokens."""
        score = self.score(milliseconds, accuracy)
        return int(len(score) - 1 - np.argmax(score[::-1]))

    @abstractmethod
    def __str__(self) -> str:
        """In a few words, for tables and reports."""


@dataclass(frozen=True)
class Utility(Objective):
    """The POMT paper's utility: U(n) = alpha (1 - L(n) / max L) + (1 - alpha) A(n) / max A.

    Source: arXiv 2407.05941, section 3.2.

    Args:
        alpha: Weight of latency against accuracy, in [0, 1]; the paper's 0.5 prunes most models hard.

    Raises:
        ArgumentError: If `alpha` is outside [0, 1].

    Example:
        >>> import numpy as np
        >>> from lightning_prune import Utility
        >>> latency, accuracy = np.array([5.0, 7.0, 10.0]), np.array([0.6, 0.9, 1.0])
        >>> Utility(0.5).score(latency, accuracy).round(2).tolist()
        [0.55, 0.6, 0.5]
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Checks `alpha`."""
        check_between("alpha", self.alpha, 0, 1)

    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """The utility of every candidate."""
        return self.alpha * (1 - milliseconds / milliseconds.max()) + (1 - self.alpha) * accuracy / accuracy.max()

    def __str__(self) -> str:
        return f"utility, alpha {self.alpha:g}"


@dataclass(frozen=True)
class AccuracyBudget(Objective):
    """The fastest candidate whose proxy loses at most `max_drop`.

    Args:
        max_drop: Share of the dense proxy that may be lost: 0.005 is half a percent, 0 is nothing.
        confidence: One-sided confidence with which the loss has to be within `max_drop`, in [0.5, 1). The proxy is
            measured on some images, and varies with them: 0.5 takes it as it was measured, 0.95 takes it less 1.64
            standard errors. With more images, less is taken off.

    Raises:
        ArgumentError: If `max_drop` is outside [0, 1), or `confidence` outside [0.5, 1).

    Example:
        >>> import numpy as np
        >>> from lightning_prune import AccuracyBudget
        >>> latency, accuracy = np.array([5.0, 7.0, 10.0]), np.array([0.6, 0.97, 1.0])
        >>> AccuracyBudget(0.05).best(latency, accuracy), AccuracyBudget(0).best(latency, accuracy)
        (1, 2)
    """

    max_drop: float = 0.005
    confidence: float = 0.5

    def __post_init__(self) -> None:
        """Checks the arguments."""
        check_half_open("max_drop", self.max_drop, 0, 1)
        check_half_open("confidence", self.confidence, 0.5, 1)

    def judged(self, accuracy: Sequence[Estimate]) -> Column:
        """(candidates,) the lower bound of each accuracy at the confidence."""
        if self.confidence == 0.5:  # a standard error may be infinite
            return super().judged(accuracy)
        quantile = NormalDist().inv_cdf(float(self.confidence))
        return np.array([estimate.value - quantile * estimate.stderr for estimate in accuracy])

    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """1 - L / max L within the budget, -inf outside; dense is always within."""
        within = accuracy >= 1 - self.max_drop - _ACCURACY_ROUNDING
        within[-1] = True
        return np.where(within, 1 - milliseconds / milliseconds.max(), -np.inf)

    def tolerates(self, accuracy: Estimate, planned: float) -> bool:
        """Whether the loss is within the budget."""
        return float(self.judged([accuracy])[0]) >= 1 - self.max_drop - _ACCURACY_ROUNDING

    def __str__(self) -> str:
        with_confidence = f" with {100 * self.confidence:.4g}% confidence" if self.confidence > 0.5 else ""
        return f"accuracy budget, at most {100 * self.max_drop:g}% lost{with_confidence}"


@dataclass(frozen=True)
class LatencyBudget(Objective):
    """The most accurate candidate within a latency; of those that lose nothing the one that removes the fewest tokens.

    A proxy above that of the dense model counts as that: a model that agrees with the dense one more surely than it
    does itself is not more accurate, and faster candidates would be chosen for their noise.

    Args:
        ms: Milliseconds that a batch may take at most.
        speedup: Smallest ratio of the dense latency to the candidate's; one of the two is given.
        percentile: Percentile of the latencies that `ms` bounds: 50, the median, or 90. The 90th percentile of what is
            not timed is predicted by that of the dense model.

    Raises:
        ArgumentError: If not exactly one of `ms` and `speedup` is given, or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from lightning_prune import LatencyBudget
        >>> latency, accuracy = np.array([5.0, 7.0, 9.0, 10.0]), np.array([0.8, 0.95, 0.99, 1.0])
        >>> LatencyBudget(ms=8).best(latency, accuracy), LatencyBudget(speedup=2).best(latency, accuracy)
        (1, 0)
    """

    wants_most_accurate: ClassVar[bool] = True

    ms: float | None = None
    speedup: float | None = None
    percentile: int = 50
    _tail_ratio: float = field(default=1.0, init=False, repr=False, compare=False)  # that percentile over the median

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if (self.ms is None) == (self.speedup is None):
            raise ArgumentError(
                f"A LatencyBudget has one of `ms` and `speedup`, got ms={self.ms!r}, speedup={self.speedup!r}."
            )
        if self.speedup is None:
            check_above("ms", self.ms, 0)
        else:
            check_above("speedup", self.speedup, 1)
        check("percentile", self.percentile, "50 or 90", self.percentile in (50, 90))
        check("percentile", self.percentile, "50 with `speedup`", self.ms is not None or self.percentile == 50)

    def latency_text(self, milliseconds: float, p90_ms: float | None = None) -> str:
        """The latency at the percentile of the budget; the median, which is said, where its tail was never timed."""
        if self.percentile == 50:
            return super().latency_text(milliseconds)
        if p90_ms is None and self._tail_ratio == 1:
            return f"{three_digits(milliseconds)} ms at the median"
        tail_ms = milliseconds * self._tail_ratio if p90_ms is None else p90_ms
        return f"{three_digits(tail_ms)} ms at the 90th percentile"

    def with_tail_of(self, dense: LatencyStats) -> "LatencyBudget":
        """The same budget, with the ratio of the percentile to the median of a timed dense model."""
        if self.percentile == 50 or dense.p90_ms is None:
            return self
        known = copy.copy(self)
        object.__setattr__(known, "_tail_ratio", dense.p90_ms / dense.milliseconds)
        return known

    def limit_ms(self, dense_ms: float) -> float:
        """The longest median latency that meets the budget, without tolerance.

        Args:
            dense_ms: Latency of the dense model.
        """
        return self.ms / self._tail_ratio if self.ms is not None else dense_ms / float(self.speedup or 1)

    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """The accuracy within the budget, at most 1; -inf outside."""
        limit = self.limit_ms(milliseconds[-1]) * (1 + RATIO_TOLERANCE)
        return np.where(milliseconds <= limit, np.minimum(accuracy, 1.0), -np.inf)

    def score_feasible(self, milliseconds: Column, accuracy: Column) -> Column:
        """The accuracy, at most 1."""
        return np.minimum(accuracy, 1.0)

    def infeasible_reason(self, milliseconds: Column) -> str | None:
        """Why no candidate is within the budget: the predicted latency of the fastest one."""
        fastest, dense_ms = float(np.min(milliseconds)), float(milliseconds[-1])
        if fastest <= self.limit_ms(dense_ms) * (1 + RATIO_TOLERANCE):
            return None
        takes = f"{self.latency_text(fastest)}, {dense_ms / fastest:.2f}x"
        return f"The {self} cannot be reached: the fastest candidate is predicted to take {takes}."

    def violation(self, timing: LatencyStats) -> float:
        """The share by which the latency exceeds the budget."""
        if self.ms is not None:
            median = timing.milliseconds
            tail_ms = median * self._tail_ratio if timing.p90_ms is None else timing.p90_ms
            return (median if self.percentile == 50 else tail_ms) / self.ms - 1
        return timing.ratio * float(self.speedup or 1) - 1

    def __str__(self) -> str:
        limit = f"{self.ms:g} ms" if self.ms is not None else f"{self.speedup:g}x"
        return f"latency budget, {limit}" + (" at the 90th percentile" if self.percentile == 90 else "")
