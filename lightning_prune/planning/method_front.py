"""The front of one method: its schedules over all blocks, predicted by what was timed of them so far."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.blocks_plan import FrontEntry
from lightning_prune.planning.choice import missed_by_dense, spread
from lightning_prune.planning.front_entries import entries_of, numbered
from lightning_prune.planning.latency_model import LatencyModel
from lightning_prune.planning.objective import Objective
from lightning_prune.planning.prices import price_of
from lightning_prune.planning.programme import pareto_front
from lightning_prune.planning.step_costs import Table
from lightning_prune.profiling import Timing
from lightning_prune.profiling.curve import SAVING
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

_MOST = 8  # schedules whose proxy is measured for one choice, after the first few
_FIRST = 4

Removed = tuple[int, ...]


class MethodFront:
    """Schedules of one method by predicted latency, and the proxy of those that were asked for.

    The latency model learns: each schedule that is timed makes the prices of the method surer, and those beside it on
    the front are predicted by how much longer, or shorter, it took than these prices say.

    Args:
        reduction: The method.
        label: What to call it among others.
        latency: Of the tokens alone.
        costs: (depth, levels, levels) cost of accuracy, as `pareto_front` takes them.
        measure: The proxy of a schedule, relative to dense.
        name: What the proxy means.
        probed: Any schedules with their timings, for the prices.

    Attributes:
        entries: A few of the front, from the fastest to dense: of those about as fast the one that costs least.
        values: What a schedule removes -> its proxy, where it was measured.
    """

    def __init__(
        self,
        reduction: Reduction,
        label: str,
        latency: LatencyModel,
        costs: Table,
        measure: Callable[[Reduction, Schedule], float],
        name: str,
        probed: Iterable[tuple[Schedule, Timing]] = (),
    ) -> None:
        self.reduction, self.label, self.name = reduction, label, name
        self._plain, self._costs, self._measure = latency, costs, measure
        self._probed = list(probed)
        self._timed: dict[Removed, tuple[FrontEntry, Timing]] = {}
        self.values: dict[Removed, float] = {}
        self._known: dict[float, float] = {0.0: 1.0}  # cost -> proxy
        self._all: list[FrontEntry] = []
        self._fit()

    @property
    def dense(self) -> FrontEntry:
        """The schedule that removes nothing."""
        return self._all[0]

    @property
    def tokens(self) -> int:
        """N."""
        return int(self._plain.levels[-1])

    def ratio(self, entry: FrontEntry) -> float:
        """Predicted latency over dense."""
        return entry.milliseconds / self._plain.dense_ms

    def observe(self, entry: FrontEntry, timing: Timing) -> None:
        """Takes the timing of a schedule of the front."""
        self._timed[entry.schedule.removed] = entry, timing
        self._fit()

    def accuracy(self, entry: FrontEntry) -> float:
        """The proxy of a schedule, measured once; 1 of dense."""
        removed = entry.schedule.removed
        if not entry.schedule.total:
            return 1.0
        if removed not in self.values:
            self.values[removed] = self._known[entry.cost] = self._measure(self.reduction, entry.schedule)
        return self.values[removed]

    def estimate(self, entry: FrontEntry) -> float:
        """The proxy of a schedule; where it was not measured, straight between those that cost less and more."""
        if entry.schedule.removed in self.values:
            return self.values[entry.schedule.removed]
        costs = sorted(self._known)
        return float(np.interp(entry.cost, costs, [self._known[cost] for cost in costs]))

    def everything(self, chosen: FrontEntry | None = None) -> list[FrontEntry]:
        """The whole front from dense to the fastest, and one more schedule, with the proxies that were measured."""
        found = {entry.schedule.removed: entry for entry in ([chosen] if chosen else []) + self._all}
        ordered = sorted(found.values(), key=lambda entry: -entry.milliseconds)
        return [
            replace(entry, accuracy=1.0 if not entry.schedule.total else self.values.get(entry.schedule.removed))
            for entry in ordered
        ]

    def choose(self, objective: Objective, dense_ms: float, max_seconds: float) -> tuple[FrontEntry, str]:
        """The best schedule by what is known, with its proxy measured, and why.

        Args:
            objective: What makes one better than another.
            dense_ms: Latency of the unpruned model, as of now.
            max_seconds: When no further proxy is measured; the first few and one choice always are.

        Raises:
            ArgumentError: If no schedule is predicted to keep to a budget; says what the fastest is predicted to take.
        """
        everything = np.array([self.ratio(entry) for entry in self.entries])
        fastest = self.entries[0]
        if objective.unreachable(range(len(everything)), dense_ms * everything) is not None:
            raise ArgumentError(
                f"The {objective} cannot be reached: the fastest schedule is predicted to take "
                f"{dense_ms * everything[0]:.3g} ms, {1 / everything[0]:.2f}x, and leaves "
                f"{fastest.schedule.tokens(self.tokens)[-1]} tokens."
            )
        missed = missed_by_dense(dense_ms, objective)
        useful = [entry for entry in self.entries if self.ratio(entry) < 1 - SAVING]
        candidates = [*useful, self.dense]
        ratios = np.array([self.ratio(entry) for entry in candidates])
        if not useful or objective.unreachable(range(len(ratios)), dense_ms * ratios) is not None:
            return self.dense, (
                f"No schedule is predicted to be faster than dense by more than 2%; the fastest by "
                f"{100 * (1 - everything[0]):.1f}%, its own price included.{missed}"
            )
        deadline = time.perf_counter() + max_seconds
        if len(self._known) == 1:
            for entry in spread(useful, _FIRST):
                self.accuracy(entry)
        for attempt in range(_MOST):
            chosen = candidates[objective.best(dense_ms * ratios, np.array([self.estimate(e) for e in candidates]))]
            known = chosen is self.dense or chosen.schedule.removed in self.values
            if known or (attempt and time.perf_counter() > deadline):
                break
            self.accuracy(chosen)
        places = [i for i, e in enumerate(candidates) if e is self.dense or e.schedule.removed in self.values]
        proxies = np.array([self.accuracy(candidates[place]) for place in places])
        chosen = candidates[places[objective.best(dense_ms * ratios[places], proxies)]]
        if chosen is self.dense:
            return (
                chosen,
                f"Dense is best by the objective ({objective}): every faster schedule costs too much.{missed}",
            )
        saved, kept = 100 * (1 - self.ratio(chosen)), 100 * self.accuracy(chosen)
        return chosen, f"Best by {objective}: {saved:.1f}% less latency, {kept:.2f}% of the dense {self.name}."

    def fastest(self) -> tuple[FrontEntry, str]:
        """The fastest schedule, with what to say of it; its proxy is measured."""
        entry = self.entries[0]
        return (
            entry,
            f"The fastest schedule of {self.label}: {100 * self.accuracy(entry):.2f}% of the dense {self.name}.",
        )

    def _fit(self) -> None:
        """Prices and front from all that was timed."""
        timed = [(entry.schedule, timing) for entry, timing in self._timed.values()]
        latency = replace(self._plain, price=price_of(self._plain, [*self._probed, *timed]))
        points = pareto_front([int(level) for level in latency.levels], latency.steps(), self._costs, latency.dense_ms)
        predicted = [latency.predict(schedule) for schedule, _ in timed]
        actual = [timing.ratio * latency.dense_ms for _, timing in timed]
        self._all = entries_of(self.label, points, self.tokens, predicted, actual)
        self.entries = numbered(self._all)
