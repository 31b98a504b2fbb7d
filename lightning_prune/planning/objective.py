"""What the planner optimises: from latency and accuracy at each token count to the count to deploy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_prune.errors import ArgumentError

Column = NDArray[np.float64]


class Objective(ABC):
    """How good a point of the curve is. Higher is better; `-inf` is a point that may not be chosen."""

    @abstractmethod
    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """The value of every point.

        Args:
            milliseconds: (points,) latency, the last point dense.
            accuracy: (points,) proxy relative to dense: 1 is as good as dense.
        """

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
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Checks `alpha`."""
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
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
        max_drop: Share of the dense proxy that may be lost: 0.005 is half a percent.

    Raises:
        ArgumentError: If `max_drop` is outside [0, 1).
    """

    max_drop: float = 0.005

    def __post_init__(self) -> None:
        """Checks `max_drop`."""
        if isinstance(self.max_drop, bool) or not isinstance(self.max_drop, int | float) or not 0 <= self.max_drop < 1:
            raise ArgumentError(f"`max_drop` must be a number in [0, 1), got {self.max_drop!r}.")

    def score(self, milliseconds: Column, accuracy: Column) -> Column:
        """1 - L / max L inside the budget, -inf outside; dense is always inside."""
        inside = accuracy >= 1 - self.max_drop
        inside[-1] = True
        return np.where(inside, 1 - milliseconds / milliseconds.max(), -np.inf)

    def __str__(self) -> str:
        return f"accuracy budget, at most {100 * self.max_drop:g}% lost"
