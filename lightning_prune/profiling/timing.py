"""Timing alternatives against each other in one run, so that the drift of the machine cancels."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from lightning_prune.device import synchronize

K = TypeVar("K")


@dataclass(frozen=True)
class Timing:
    """A time and how sure it is.

    Attributes:
        milliseconds: Median.
        spread: Half the distance between the quartiles, in milliseconds.
        ratio: Median of time / reference time *of the same round*: free of drift.
        ratio_spread: Half the distance between its quartiles.
        rounds: Measurements behind it.
    """

    milliseconds: float
    spread: float
    ratio: float
    ratio_spread: float
    rounds: int


@dataclass
class Interleaved(Generic[K]):
    """Rounds of single timed runs, one of each alternative a round, in an order that is shuffled anew each time.

    Args:
        prepare: Makes an alternative the one that `run` runs; not timed.
        run: One forward pass.
        device: What to wait for.
        reference: The alternative that ratios refer to; part of every round.
        clock: Seconds; replaced in tests.
    """

    prepare: Callable[[K], None]
    run: Callable[[], object]
    device: torch.device
    reference: K
    clock: Callable[[], float] = time.perf_counter
    _rounds: list[dict[K, float]] = field(default_factory=list)
    _warm: set[K] = field(default_factory=set)
    _shuffle: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def once(self, alternative: K) -> float:
        """Seconds of one run, from an idle device to an idle device."""
        self.prepare(alternative)
        torch.clear_autocast_cache()  # under autocast every step of a loop casts the weights, so every run must
        synchronize(self.device)
        start = self.clock()
        self.run()
        synchronize(self.device)
        return self.clock() - start

    def measure(
        self,
        alternatives: Iterable[K],
        rounds: int,
        deadline: float = float("inf"),
        progress: Callable[[], None] = lambda: None,
    ) -> int:
        """Adds up to `rounds` rounds over `alternatives` and the reference; returns how many were completed.

        Every alternative first runs once untimed (allocations, kernel choice, compilation). A round that the deadline
        cuts short is dropped, except the first, which is always completed: there is a figure for all or for none.

        Args:
            alternatives: What to measure in these rounds.
            rounds: How many.
            deadline: On the clock's scale; checked between runs.
            progress: Called after every run.
        """
        chosen: Sequence[K] = list(dict.fromkeys([self.reference, *alternatives]))
        for alternative in chosen:
            if alternative not in self._warm:
                self.once(alternative)
                self._warm.add(alternative)
                progress()
        for done in range(rounds):
            times: dict[K, float] = {}
            for position in self._shuffle.permutation(len(chosen)):
                if done and self.clock() > deadline:
                    return done
                times[chosen[position]] = self.once(chosen[position])
                progress()
            self._rounds.append(times)
        return rounds

    def has(self, alternative: K) -> bool:
        """Whether an alternative was part of any round."""
        return any(alternative in times for times in self._rounds)

    def result(self, alternative: K) -> Timing:
        """The timing of one alternative over all rounds that it was part of."""
        together = [times for times in self._rounds if alternative in times]
        reference = np.array([times[self.reference] for times in together])
        ratios = np.array([times[alternative] for times in together]) / reference
        baseline = 1e3 * float(np.median([times[self.reference] for times in self._rounds]))
        ratio, ratio_spread = _middle(ratios)
        own = np.array([times[alternative] for times in together])
        _, spread = _middle(1e3 * own)
        # The median ratio on the common baseline: alternatives that joined in later rounds stay comparable.
        return Timing(ratio * baseline, spread, ratio, ratio_spread, len(together))


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(median), float(high - low) / 2
