"""Interleaved timing: alternatives are timed against each other in one run, so that the machine's drift cancels.

It needs numpy alone, as `lightning_prune.bundle` copies this file to devices without torch.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from lightning_prune.profiling.clocks import CpuClock
from lightning_prune.profiling.page_faults import count_page_faults, unequal_faults

K = TypeVar("K")

NORMAL_QUARTILE = 0.6745
"""Half the interquartile range of a standard normal distribution."""
MEDIAN_STDERR = 1.2533
"""Standard error of a median of n normal samples, times sqrt(n) and over their standard deviation."""
LEAST_ROUNDS = 3
"""Rounds from which a latency has quartiles: of fewer, no interval is claimed."""
OWN_MEMORY = 0.0
"""`settle_seconds` of alternatives that each have a copy of the weights: one untimed run fetches it again."""
OWN_THREADS = 0.02
"""`settle_seconds` of alternatives with different pools of threads: those of OpenMP spin for milliseconds after a run,
and take a core from the next. At 2 threads this made 16 ms of ONNX Runtime after PyTorch 3 ms longer."""
_LONG_SECONDS = 0.2  # of a run to which it makes less than 2% what ran before
_MOST_UNTIMED = 8


def timed_seconds(run_seconds: float, settle_seconds: float | None) -> float:
    """Seconds that a timed run takes with the untimed ones before it.

    Args:
        run_seconds: Of a run.
        settle_seconds: Of the timer.

    Example:
        >>> from lightning_prune.profiling.interleaved_timer import OWN_MEMORY, OWN_THREADS, timed_seconds
        >>> [round(timed_seconds(0.015, settle), 3) for settle in (None, OWN_MEMORY, OWN_THREADS)]
        [0.015, 0.03, 0.045]
        >>> timed_seconds(1.0, OWN_THREADS)
        1.02
    """
    if settle_seconds is None:
        return run_seconds
    if run_seconds > _LONG_SECONDS:
        return run_seconds + settle_seconds
    untimed = min(max(ceil(settle_seconds / max(run_seconds, 1e-9)), 1), _MOST_UNTIMED)
    return run_seconds * (1 + untimed)


@dataclass(frozen=True)
class _HuberFit:
    """Iteratively reweighted least squares with Huber's weights.

    Attributes:
        iterations: Number of times that the weights are computed.
        threshold_sigmas: Standard deviations beyond which a run weighs less.
        min_sigma: Relative standard deviation below which no run counts as an outlier.
    """

    iterations: int = 12
    threshold_sigmas: float = 1.5
    min_sigma: float = 1e-3


_FIT = _HuberFit()


@dataclass(frozen=True)
class LatencyStats:
    """A measured latency and its uncertainty.

    Attributes:
        milliseconds: Median.
        spread: Half the interquartile range, in milliseconds.
        ratio: Median of latency / reference latency *of the same round*, which is free of drift.
        ratio_spread: Half the interquartile range of that ratio.
        rounds: Number of measurements.
        p90_ms: 90th percentile in milliseconds; None where it is not known.
        low_ms: Lower quartile of the milliseconds as they were timed; None where it is not known. With the drift of the
            machine the median, which is free of it, may lie outside the quartiles.
        high_ms: Upper quartile.
        faults: Median of the page faults of a run, without those that read a disk; None where they are not counted.
    """

    milliseconds: float
    spread: float
    ratio: float
    ratio_spread: float
    rounds: int
    p90_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    faults: float | None = None

    @property
    def ratio_stderr(self) -> float:
        """Standard error of the median ratio, from its quartiles and the number of rounds."""
        return MEDIAN_STDERR * self.ratio_spread / NORMAL_QUARTILE / sqrt(self.rounds)

    @property
    def has_interval(self) -> bool:
        """Whether there were rounds enough to say how far the latency varies."""
        return self.rounds >= LEAST_ROUNDS

    def fault_remark(self, dense: "LatencyStats", fault_us: float | None) -> str:
        """What is said where page faults change the speed-up by more than 2%; see `unequal_faults`.

        Args:
            dense: The reference, timed in the same run.
            fault_us: Microseconds that a page fault takes; None where that is not known.
        """
        return unequal_faults(self.milliseconds, self.faults, dense.milliseconds, dense.faults, fault_us)


@dataclass
class InterleavedTimer(Generic[K]):
    """Times alternatives in rounds: every round runs each of them once, in a new random order.

    Args:
        prepare: Makes an alternative the one that `run` runs; not timed.
        run: One forward pass.
        synchronize: Waits until the device is idle; called before and after each run.
        reference: The alternative that ratios refer to; part of every round.
        clock: Returns seconds. With a `CpuClock`, runs are timed by CPU time, and deadlines are in wall time.
        references: The alternatives that are part of every round of an alternative besides `reference`; its ratio
            refers to the first of them, where there is one.
        settle_seconds: Where alternatives share neither weights nor threads, how long untimed runs go on before each
            timed one, so that what is timed is one of many runs in a row: at least one run and at most 8, and a pause
            in place of runs that take more than 0.2 s. None for no untimed runs, as of models in PyTorch.

    Example:
        >>> from lightning_prune.profiling import InterleavedTimer
        >>> now, current = [0.0], ["dense"]
        >>> def run():
        ...     now[0] += {"dense": 0.010, "pruned": 0.008}[current[0]]
        >>> timer = InterleavedTimer(
        ...     lambda name: current.__setitem__(0, name), run, lambda: None, "dense", clock=lambda: now[0]
        ... )
        >>> timer.measure(["pruned"], rounds=5)
        5
        >>> round(timer.result("pruned").ratio, 3)
        0.8
    """

    prepare: Callable[[K], None]
    run: Callable[[], object]
    synchronize: Callable[[], object]
    reference: K
    clock: Callable[[], float] = time.perf_counter
    references: Callable[[K], Sequence[K]] = lambda _: ()
    settle_seconds: float | None = None
    _rounds: list[dict[K, float]] = field(default_factory=list)
    _faults: list[dict[K, int | None]] = field(default_factory=list)  # of the same rounds
    _last_faults: int | None = None
    _fitted: tuple[int, "_Levels[K]"] | None = None
    _first_runs: dict[K, float] = field(default_factory=dict)
    _wall_seconds: dict[K, float] = field(default_factory=dict)  # of the last run, without first runs
    _shuffle: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _passed: float = 0.0
    _timed: float = 0.0

    def once(self, alternative: K) -> float:
        """Runs an alternative once, from an idle device to an idle device, and returns the seconds."""
        self.prepare(alternative)
        self.synchronize()
        is_first, reached = alternative not in self._first_runs, self.clock()  # the first run is that which converts
        if self.settle_seconds is not None and not is_first:
            self._settle(self.settle_seconds, self._wall_seconds.get(alternative, 0.0))
        before, began = count_page_faults(), time.perf_counter()
        start = self.clock.of_run() if isinstance(self.clock, CpuClock) else self.clock()
        self.run()
        self.synchronize()
        ended = self.clock.of_run() if isinstance(self.clock, CpuClock) else self.clock()
        seconds = ended - start
        after = count_page_faults()
        if not is_first:
            self._wall_seconds[alternative] = time.perf_counter() - began
            self._passed += (self.clock() if isinstance(self.clock, CpuClock) else ended) - reached
            self._timed += seconds
        self._last_faults = None if before is None or after is None else after - before
        return seconds

    def _settle(self, seconds: float, expected: float) -> None:
        """Runs what is prepared, untimed; a pause takes the place of runs that are expected to take long."""
        if expected > _LONG_SECONDS:
            time.sleep(seconds)
            return
        start = time.perf_counter()
        for _ in range(_MOST_UNTIMED):
            self.run()
            self.synchronize()
            if time.perf_counter() - start >= seconds:
                return

    @property
    def pace(self) -> float:
        """Seconds of deadlines that pass for each second of a run by its clock, over all but the first runs.

        Untimed runs are part of it.
        """
        return self._passed / self._timed if self._timed > 0 else 1.0

    def warm_up(self, alternative: K) -> float:
        """Seconds of the first run of an alternative, which no statistic includes; runs it if that has not happened.

        A first run allocates memory, chooses kernels and compiles.
        """
        if alternative not in self._first_runs:
            self._first_runs[alternative] = self.once(alternative)
        return self._first_runs[alternative]

    def measure(
        self,
        alternatives: Iterable[K],
        rounds: int,
        deadline: float = float("inf"),
        on_step: Callable[[], None] = lambda: None,
        min_rounds: int = 1,
    ) -> int:
        """Adds up to `rounds` rounds over `alternatives` and the reference, after warming up each of them.

        A round that the deadline interrupts is dropped, except for the first `min_rounds` rounds where an alternative
        has no measurement yet: afterwards all of them have one.

        Args:
            alternatives: What to measure.
            rounds: Number of rounds.
            deadline: In seconds of `clock`; checked between runs.
            on_step: Called after every run.
            min_rounds: Rounds to complete even after the deadline, where an alternative has no measurement yet.

        Returns:
            The number of completed rounds.
        """
        wanted = list(alternatives)
        references = [reference for alternative in wanted for reference in self.references(alternative)]
        chosen: Sequence[K] = list(dict.fromkeys([self.reference, *references, *wanted]))
        for alternative in chosen:
            if alternative not in self._first_runs:
                self.warm_up(alternative)
                on_step()
        required = 0 if all(map(self.has, chosen)) else min_rounds
        for completed in range(rounds):
            times: dict[K, float] = {}
            faults: dict[K, int | None] = {}
            for position in self._shuffle.permutation(len(chosen)):
                if completed >= required and self.clock() > deadline:
                    return completed
                times[chosen[position]] = self.once(chosen[position])
                faults[chosen[position]] = self._last_faults
                on_step()
            self._rounds.append(times)
            self._faults.append(faults)
        return rounds

    def has(self, alternative: K) -> bool:
        """Whether an alternative was part of any round."""
        return any(alternative in times for times in self._rounds)

    def result(self, alternative: K, reference: K | None = None) -> LatencyStats:
        """Statistics of one alternative over all rounds that it and its reference were part of.

        Args:
            alternative: It was measured.
            reference: What the ratio refers to; that of the timer if None.
        """
        if reference is None:
            reference = next(iter(self.references(alternative)), self.reference)
        rounds = [place for place, times in enumerate(self._rounds) if alternative in times and reference in times]
        shared = [self._rounds[place] for place in rounds]
        seconds = np.array([times[alternative] for times in shared])
        ratios = seconds / np.array([times[reference] for times in shared])
        baseline_ms = 1e3 * float(np.median([times[reference] for times in self._rounds if reference in times]))
        ratio, ratio_spread = _median_and_spread(ratios)
        _, spread = _median_and_spread(1e3 * seconds)
        # The median ratio times one common baseline: alternatives that joined in later rounds stay comparable.
        low_ms, high_ms, p90_ms = (1e3 * float(each) for each in np.percentile(seconds, (25, 75, 90)))
        faults = self._median_faults(alternative, rounds)
        return LatencyStats(
            ratio * baseline_ms, spread, ratio, ratio_spread, len(shared), p90_ms, low_ms, high_ms, faults
        )

    def levels(self) -> dict[K, LatencyStats]:
        """Statistics of all alternatives at once, free of drift; the reference is treated like the others.

        The quartiles and the 90th percentile are free of it, too.

        Model: log(seconds) = (effect of the round) + (effect of the alternative), fitted by least squares with Huber's
        weights, so that load spikes have little influence. The ratio of two alternatives is then not as noisy as the
        reference, by which `result` divides. Rounds of a single run compare nothing and are left out.
        """
        fitted = self._fit()
        if fitted is None:
            return {self.reference: self.result(self.reference)}
        typical_round = np.median(fitted.round_effects)
        reference = fitted.effects[fitted.names.index(self.reference)]
        stats: dict[K, LatencyStats] = {}
        for index, name in enumerate(fitted.names):
            own, effect = fitted.residuals[fitted.known[:, index], index], fitted.effects[index]
            _, spread = _median_and_spread(own)
            ms, ratio = 1e3 * float(np.exp(effect + typical_round)), float(np.exp(effect - reference))
            low_ms, high_ms, p90_ms = (ms * float(each) for each in np.exp(np.percentile(own, (25, 75, 90))))
            faults = self._median_faults(name, range(len(self._rounds)))
            spreads = ms * spread, ratio, ratio * spread
            stats[name] = LatencyStats(ms, *spreads, len(own), p90_ms, low_ms, high_ms, faults)
        return stats

    def drift(self) -> float:
        """How far the speed of the machine moved between rounds: half the interquartile range, over the median.

        It is what `levels` takes out of the latencies; 0 where nothing was compared.
        """
        fitted = self._fit()
        return 0.0 if fitted is None else _median_and_spread(fitted.round_effects)[1]

    def _median_faults(self, alternative: K, rounds: Iterable[int]) -> float | None:
        counted = [self._faults[place].get(alternative) for place in rounds]
        known = [faults for faults in counted if faults is not None]
        return float(np.median(known)) if known else None

    def _fit(self) -> "_Levels[K] | None":
        """The model of `levels` for the rounds so far; None where none compares anything."""
        if self._fitted is not None and self._fitted[0] == len(self._rounds):
            return self._fitted[1]
        compared = [times for times in self._rounds if len(times) > 1]
        if not compared:
            return None
        names = list(dict.fromkeys(name for times in compared for name in times))
        logs = np.log(np.array([[times.get(name, np.nan) for name in names] for times in compared]))
        known = ~np.isnan(logs)
        logs = np.where(known, logs, 0.0)
        round_effects, effects = _fit_two_way(logs, known)
        # Each round was fitted to its own few runs, so its residuals are too small by sqrt((n - 1) / n).
        runs = known.sum(1, keepdims=True)
        residuals = (logs - round_effects[:, None] - effects) * np.sqrt(runs / (runs - 1))
        self._fitted = len(self._rounds), _Levels(names, known, residuals, round_effects, effects)
        return self._fitted[1]


class _Levels(NamedTuple, Generic[K]):
    """log(seconds) = round + alternative, as it was fitted.

    Attributes:
        names: The alternatives.
        known: (rounds, alternatives) whether there was a run.
        residuals: (rounds, alternatives) of the logarithms.
        round_effects: (rounds,).
        effects: (alternatives,).
    """

    names: list[K]
    known: np.ndarray
    residuals: np.ndarray
    round_effects: np.ndarray
    effects: np.ndarray


def _fit_two_way(logs: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits log(seconds) = round + alternative by iteratively reweighted least squares.

    Each weighted fit is solved exactly, by eliminating the rounds. Fitting rounds and alternatives in turn would stop
    short of the solution where there is so little noise that the weights of all outliers vanish.

    Args:
        logs: (rounds, alternatives) logarithms of the seconds; 0 where there was no run.
        known: (rounds, alternatives) whether there was a run.

    Returns:
        Effects of the rounds (rounds,) and of the alternatives (alternatives,); the latter add up to 0.
    """
    weights = known.astype(float)
    for _ in range(_FIT.iterations):
        total = weights.sum(1, keepdims=True)
        matrix = np.diag(weights.sum(0)) - weights.T @ (weights / total)
        target = (weights * (logs - (weights * logs).sum(1, keepdims=True) / total)).sum(0)
        effects = np.linalg.solve(matrix + 1.0, target)  # adding 1 makes the sum 0, which the equations leave open
        round_effects = (weights * (logs - effects)).sum(1) / total[:, 0]
        residuals = np.abs(logs - round_effects[:, None] - effects)
        sigma = max(float(np.median(residuals[known])) / NORMAL_QUARTILE, _FIT.min_sigma)
        weights = known * np.minimum(1.0, _FIT.threshold_sigmas * sigma / np.maximum(residuals, _FIT.min_sigma))
    return round_effects, effects


def _median_and_spread(values: np.ndarray) -> tuple[float, float]:
    """The median and half the interquartile range."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(median), float(high - low) / 2
