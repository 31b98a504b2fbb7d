"""A target speed-up while it is being verified: which amount to try next, and when to be content."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, floor, sqrt

from lightning_prune.profiling import Timing, Variant
from lightning_prune.profiling.curve import SAVING

NEAR = 0.005  # a ratio that misses by no more has reached its target: no clock is surer
_ATTEMPTS = 6  # verifications of one goal

VariantOf = Callable[[int], Variant]


@dataclass
class Goal:
    """A target speed-up of one method while it is being verified.

    Attributes:
        variant_of: The variant that removes so many tokens.
        speedup: The target.
        amount: What is tried; what is to be deployed, in the end.
        least: The smallest amount that may be tried.
        most: The largest.
        open: Whether another amount is to be tried.
        ratios: Amount that was timed -> its latency over dense.
        passed: The same -> whether it reaches the target.
        best: The largest speed-up that was timed.
    """

    variant_of: VariantOf
    speedup: float
    amount: int
    least: int
    most: int
    open: bool = True
    ratios: dict[int, float] = field(default_factory=dict)
    passed: dict[int, bool] = field(default_factory=dict)
    best: float = 0.0

    @property
    def variant(self) -> Variant:
        """What is tried."""
        return self.variant_of(self.amount)

    @property
    def reached(self) -> bool:
        """Whether the amount is seen to reach the target."""
        return self.passed.get(self.amount, False)

    @property
    def unreachable(self) -> bool:
        """Whether not even the largest amount reaches the target."""
        return not self.reached and self.passed.get(self.most) is False

    def judge(self, timing: Timing) -> None:
        """Takes the timing of the present amount and moves on to another, unless this is the smallest that will do.

        A ratio that misses the target by no more than its noise, two standard errors, but at least 0.5% and at most 2%,
        counts as reached. One that is better by more than that, and by more than a token is worth, asks for fewer
        tokens. Between an amount that misses the target and one that reaches it, others are tried until they meet, a
        few times at most.
        """
        wanted, noise = 1 / self.speedup, min(max(2 * error_of(timing), NEAR), SAVING)
        self.best = max(self.best, 1 / timing.ratio)
        self.ratios[self.amount], self.passed[self.amount] = timing.ratio, timing.ratio <= wanted + noise
        content = self.reached and timing.ratio >= wanted - noise
        following = self.amount if content else self._following(wanted)
        self.open = following not in self.passed and len(self.passed) < _ATTEMPTS
        if self.open:
            self.amount = following
        else:
            self.settle()

    def _following(self, wanted: float) -> int:
        """The amount to try after the present one, which reaches too little or more than is wanted."""
        passing = min((a for a, passed in self.passed.items() if passed), default=self.most + 1)
        failing = max((a for a, passed in self.passed.items() if not passed and a < passing), default=self.least - 1)
        ratio = self.ratios[self.amount]
        # What a token is worth, by the line to dense; cliffs and plateaus are found by trying.
        tokens = abs(ratio - wanted) * max(self.amount, 1) / max(1 - ratio, 0.02)
        if self.reached:
            return max(self.amount - floor(tokens), failing + 1)
        if passing in self.passed:
            # Between the two by a straight line, but well inside, as a cliff would have it.
            share = (self.ratios[failing] - wanted) / max(self.ratios[failing] - self.ratios[passing], 1e-9)
            inside = ceil(min(max(share, 0.25), 0.75) * (passing - failing))
            return failing + max(min(inside, passing - failing - 1), 1)
        if len(self.passed) >= _ATTEMPTS - 2:
            return self.most  # so that nobody is told that it cannot be reached unless it cannot
        eager = 2 ** (len(self.passed) - 1)  # where the line misled before
        return min(self.amount + max(1, ceil(tokens)) * eager, self.most)

    def settle(self) -> None:
        """Ends with the smallest amount that reaches the target, or the largest that was timed."""
        self.open = False
        self.amount = min((a for a, passed in self.passed.items() if passed), default=max(self.passed))


def error_of(timing: Timing) -> float:
    """Standard error of the median ratio, from its quartiles and the rounds."""
    return 1.2533 * timing.ratio_spread / 0.6745 / sqrt(timing.rounds)
