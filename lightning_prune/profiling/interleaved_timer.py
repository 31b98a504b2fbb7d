"""Timing alternatives against each other in one run, so that the drift of the machine cancels."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from lightning_prune._utils.device import synchronize

K = TypeVar("K")
_FITTED = 12  # times that the weights are set anew
_FAR = 1.5  # standard deviations, beyond which a run weighs less
_LEAST = 1e-3  # relative standard deviation, below which no run is far off


@dataclass(frozen=True)
class LatencyStats:
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
class InterleavedTimer(Generic[K]):
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
    _warmups: dict[K, float] = field(default_factory=dict)
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

    def warm(self, alternative: K) -> float:
        """Seconds of the first run of an alternative (allocations, kernel choice, compilation), which counts nowhere.

        It is run if it has not been.
        """
        if alternative not in self._warmups:
            self._warmups[alternative] = self.once(alternative)
        return self._warmups[alternative]

    def measure(
        self,
        alternatives: Iterable[K],
        rounds: int,
        deadline: float = float("inf"),
        progress: Callable[[], None] = lambda: None,
        least: int = 1,
    ) -> int:
        """Adds up to `rounds` rounds over `alternatives` and the reference; returns how many were completed.

        Every alternative that has not been warmed is, first. A round that the deadline cuts short is dropped, except
        the first ones over alternatives of which one has no figure yet: there is a figure for all or for none.

        Args:
            alternatives: What to measure in these rounds.
            rounds: How many.
            deadline: On the clock's scale; checked between runs.
            progress: Called after every run.
            least: Rounds that are completed whatever the deadline, where an alternative has no figure yet.
        """
        chosen: Sequence[K] = list(dict.fromkeys([self.reference, *alternatives]))
        for alternative in chosen:
            if alternative not in self._warmups:
                self.warm(alternative)
                progress()
        least = 0 if all(map(self.has, chosen)) else least
        for done in range(rounds):
            times: dict[K, float] = {}
            for position in self._shuffle.permutation(len(chosen)):
                if done >= least and self.clock() > deadline:
                    return done
                times[chosen[position]] = self.once(chosen[position])
                progress()
            self._rounds.append(times)
        return rounds

    def has(self, alternative: K) -> bool:
        """Whether an alternative was part of any round."""
        return any(alternative in times for times in self._rounds)

    def result(self, alternative: K) -> LatencyStats:
        """The timing of one alternative over all rounds that it was part of."""
        together = [times for times in self._rounds if alternative in times]
        reference = np.array([times[self.reference] for times in together])
        ratios = np.array([times[alternative] for times in together]) / reference
        baseline = 1e3 * float(np.median([times[self.reference] for times in self._rounds]))
        ratio, ratio_spread = _middle(ratios)
        own = np.array([times[alternative] for times in together])
        _, spread = _middle(1e3 * own)
        # The median ratio on the common baseline: alternatives that joined in later rounds stay comparable.
        return LatencyStats(ratio * baseline, spread, ratio, ratio_spread, len(together))

    def levels(self) -> dict[K, LatencyStats]:
        """The timings of all alternatives at once, free of drift, the reference like the others.

        A round slows all its runs by one factor, and an alternative takes its time: logarithms of all times are split
        into these two by least squares, runs far off weighing less (Huber's weights), so that a load spike moves
        neither. The ratio of two alternatives is then not as noisy as the reference, which `result` divides by. Rounds
        of a single run compare nothing and are left out.
        """
        compared = [times for times in self._rounds if len(times) > 1]
        if not compared:
            return {self.reference: self.result(self.reference)}
        names = list(dict.fromkeys(name for times in compared for name in times))
        logs = np.log(np.array([[times.get(name, np.nan) for name in names] for times in compared]))
        known = ~np.isnan(logs)
        logs = np.where(known, logs, 0.0)
        rounds, columns = _two_way(logs, known)
        # Each round was fitted to its own few runs, which makes what is left of them too small.
        size = known.sum(1, keepdims=True)
        left = (logs - rounds[:, None] - columns) * np.sqrt(size / (size - 1))
        usual = np.median(rounds)
        reference = columns[names.index(self.reference)]
        found: dict[K, LatencyStats] = {}
        for index, name in enumerate(names):
            _, spread = _middle(left[known[:, index], index])
            level, ratio = float(np.exp(columns[index] + usual)), float(np.exp(columns[index] - reference))
            rounds_of = int(known[:, index].sum())
            found[name] = LatencyStats(1e3 * level, 1e3 * level * spread, ratio, ratio * spread, rounds_of)
        return found


def _two_way(logs: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What rounds and what alternatives add to the logarithms, runs that are far off weighing less.

    Each time the weighted fit is solved exactly, by eliminating the rounds: fitted in turn, the two stop short of the
    solution where there is so little noise that the weights of all other runs vanish.

    Args:
        logs: (rounds, alternatives), 0 where there was no run.
        known: (rounds, alternatives) whether there was one.

    Returns:
        (rounds,) and (alternatives,), the latter adding up to 0.
    """
    weights = known.astype(float)
    for _ in range(_FITTED):
        total = weights.sum(1, keepdims=True)
        matrix = np.diag(weights.sum(0)) - weights.T @ (weights / total)
        wanted = (weights * (logs - (weights * logs).sum(1, keepdims=True) / total)).sum(0)
        columns = np.linalg.solve(matrix + 1.0, wanted)  # the 1 makes them add up to 0, which the rest leaves open
        rounds = (weights * (logs - columns)).sum(1) / total[:, 0]
        left = np.abs(logs - rounds[:, None] - columns)
        scale = max(float(np.median(left[known])) / 0.6745, _LEAST)
        weights = known * np.minimum(1.0, _FAR * scale / np.maximum(left, _LEAST))
    return rounds, columns


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(median), float(high - low) / 2
