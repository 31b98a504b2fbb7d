"""What the planner optimises: from latency and accuracy at each token count to the count to deploy."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.speedup_targets import NEAR
from lightning_prune.profiling import LatencyStats

Column = NDArray[np.float64]
_ROUNDING = 1e-6  # of a proxy that is a mean of float32 probabilities: not a loss


class Objective(ABC):
    """How good a point of the curve is. Higher is better; `-inf` is a point that may not be chosen."""

    @abstractmethod
    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """The value of every point.

        Args:
            milliseconds: (points,) latency, the last point dense.
            accuracy: (points,) proxy relative to dense: 1 is as good as dense.
        """

    def unreachable(self, tokens: Sequence[int], milliseconds: Column) -> str | None:
        """Why no point of a latency curve can be chosen, with the best that can be had; None where one can.

        Args:
            tokens: (points,) token counts, the last dense.
            milliseconds: (points,) latency.
        """
        return None

    def excess(self, timing: LatencyStats) -> float:
        """By what factor a point, timed beside dense, is slower than was asked for; 1 where it is not.

        Args:
            timing: Of the point.
        """
        return 1.0

    def tighten(self, factor: float) -> "Objective":
        """The objective to choose by where latencies turned out to be longer by a factor than a profile says."""
        return self

    def rescale(self, factor: float) -> "Objective":
        """The objective to choose by on a profile where all latencies, dense as well, are now so much longer."""
        return self

    def dense_is_feasible(self, milliseconds: float) -> bool:
        """Whether removing nothing is a choice.

        Args:
            milliseconds: Latency of the dense model.
        """
        return bool(self.score(np.array([milliseconds]), np.ones(1))[0] > -inf)

    def among(self, milliseconds: Column, accuracy: Column) -> Column:
        """The value of points that are known to keep to a budget, by which one of them is chosen.

        Args:
            milliseconds: (points,) latency, the last point dense.
            accuracy: (points,) proxy relative to dense.
        """
        return self.score(milliseconds, accuracy)

    def best(self, milliseconds: Column, accuracy: Column) -> int:
        """Index of the best point; of equally good ones the one with the most tokens."""
        score = self.score(milliseconds, accuracy)
        return int(len(score) - 1 - np.argmax(score[::-1]))

    @abstractmethod
    def __str__(self) -> str:
        """In a few words, for tables and panels."""


@dataclass(frozen=True)
class Utility(Objective):
    """The POMT paper's: U(n) = alpha (1 - L(n) / max L) + (1 - alpha) A(n) / max A (arXiv 2407.05941, section 3.2).

    Args:
        alpha: Weight of latency against accuracy, in [0, 1]; the paper's 0.5 prunes hard on most models.

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
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise ArgumentError(f"`alpha` must be a number in [0, 1], got {self.alpha!r}.")

    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """U of every point."""
        return self.alpha * (1 - milliseconds / milliseconds.max()) + (1 - self.alpha) * accuracy / accuracy.max()

    def __str__(self) -> str:
        return f"utility, alpha {self.alpha:g}"


@dataclass(frozen=True)
class AccuracyBudget(Objective):
    """The fastest point whose proxy loses at most `max_drop`.

    Args:
        max_drop: Share of the dense proxy that may be lost: 0.005 is half a percent, 0 is nothing.

    Raises:
        ArgumentError: If `max_drop` is outside [0, 1).

    Example:
        >>> import numpy as np
        >>> from lightning_prune import AccuracyBudget
        >>> latency, accuracy = np.array([5.0, 7.0, 10.0]), np.array([0.6, 0.97, 1.0])
        >>> AccuracyBudget(0.05).best(latency, accuracy), AccuracyBudget(0).best(latency, accuracy)
        (1, 2)
    """

    max_drop: float = 0.005

    def __post_init__(self) -> None:
        """Checks `max_drop`."""
        if not _is_number(self.max_drop) or not 0 <= self.max_drop < 1:
            raise ArgumentError(f"`max_drop` must be a number in [0, 1), got {self.max_drop!r}.")

    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """1 - L / max L inside the budget, -inf outside; dense is always inside."""
        inside = accuracy >= 1 - self.max_drop - _ROUNDING
        inside[-1] = True
        return np.where(inside, 1 - milliseconds / milliseconds.max(), -np.inf)

    def __str__(self) -> str:
        return f"accuracy budget, at most {100 * self.max_drop:g}% lost"


@dataclass(frozen=True)
class LatencyBudget(Objective):
    """The most accurate point inside a latency.

    Args:
        ms: Milliseconds that a batch may take at most.
        speedup: Dense latency over theirs, at least; one of the two is given.

    Raises:
        ArgumentError: If not one of the two is given, or it is out of range.

    Example:
        >>> import numpy as np
        >>> from lightning_prune import LatencyBudget
        >>> latency, accuracy = np.array([5.0, 7.0, 9.0, 10.0]), np.array([0.8, 0.95, 0.99, 1.0])
        >>> LatencyBudget(ms=8).best(latency, accuracy), LatencyBudget(speedup=2).best(latency, accuracy)
        (1, 0)
    """

    ms: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        """Checks the two."""
        if (self.ms is None) == (self.speedup is None):
            raise ArgumentError(
                f"A LatencyBudget has one of `ms` and `speedup`, got ms={self.ms!r}, speedup={self.speedup!r}."
            )
        name, value, least = ("ms", self.ms, 0) if self.speedup is None else ("speedup", self.speedup, 1)
        if value is None or not _is_number(value) or not least < value < inf:
            raise ArgumentError(f"`{name}` must be a finite number > {least}, got {value!r}.")

    def _limit(self, dense: float) -> float:
        """The longest that counts as inside; half a percent over is, as no clock is surer."""
        wanted = self.ms if self.ms is not None else dense / float(self.speedup or 1)
        return wanted * (1 + NEAR)

    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """The accuracy inside the budget, -inf outside."""
        return np.where(milliseconds <= self._limit(milliseconds[-1]), accuracy, -np.inf)

    def among(self, milliseconds: Column, accuracy: Column) -> Column:
        """The accuracy."""
        return accuracy

    def unreachable(self, tokens: Sequence[int], milliseconds: Column) -> str | None:
        """Why, if the fastest point is too slow."""
        fastest = int(np.argmin(milliseconds))
        if milliseconds[fastest] <= self._limit(milliseconds[-1]):
            return None
        return (
            f"The {self} cannot be reached: the fastest that was measured is {milliseconds[fastest]:.3g} ms, "
            f"{milliseconds[-1] / milliseconds[fastest]:.2f}x, with {tokens[fastest]} tokens."
        )

    def excess(self, timing: LatencyStats) -> float:
        """By what factor it is over the budget; 1 inside it, by the same half a percent as the score."""
        over = timing.milliseconds / self.ms if self.ms is not None else timing.ratio * float(self.speedup or 1)
        return over if over > 1 + NEAR else 1.0

    def tighten(self, factor: float) -> "LatencyBudget":
        """The budget of which a point is so much faster."""
        if self.ms is not None:
            return LatencyBudget(ms=self.ms / factor)
        return LatencyBudget(speedup=float(self.speedup or 1) * factor)

    def rescale(self, factor: float) -> "LatencyBudget":
        """What milliseconds of now were when the profile was made; a speed-up stays one."""
        return self if self.ms is None else LatencyBudget(ms=self.ms / factor)

    def __str__(self) -> str:
        told = f"{self.ms:g} ms" if self.ms is not None else f"{self.speedup:g}x"
        return f"latency budget, {told}"


def _is_number(value: object) -> bool:
    """Of Python or numpy; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)
