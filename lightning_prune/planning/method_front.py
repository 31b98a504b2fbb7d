"""The front of one method: its schedules over all blocks, predicted, with the proxy of those that are asked for."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.blocks_plan import FrontEntry
from lightning_prune.planning.choice import choose, missed_by_dense
from lightning_prune.planning.objective import Objective
from lightning_prune.planning.programme import FrontPoint
from lightning_prune.profiling import LatencyProfile
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

_APART = 0.005  # of dense: schedules that are closer in latency are one choice


class MethodFront:
    """Schedules of one method by predicted latency, numbered from the fastest, 1, to dense.

    To `choose` they look like the token counts of a latency curve, and this like the curve of a proxy. Only a few of
    the front are numbered: of those that are about as fast the one that costs least, and the fastest of all.

    Args:
        reduction: The method.
        points: As `pareto_front` gives them, from dense to the fastest.
        tokens: N.
        measure: The proxy of a schedule, relative to dense.
        name: What the proxy means.
        label: What to call the method among others.

    Attributes:
        entries: Those that are numbered, from the fastest to dense.
        values: Number -> proxy, where it was measured.
        name: What the proxy means.
        label: What to call the method among others.
    """

    def __init__(
        self,
        reduction: Reduction,
        points: list[FrontPoint],
        tokens: int,
        measure: Callable[[Reduction, Schedule], float],
        name: str,
        label: str | None = None,
    ) -> None:
        self.reduction, self.name, self._measure, self._tokens = reduction, name, measure, tokens
        self.label = reduction.name if label is None else label
        self._all: list[FrontEntry] = []
        for point in points:
            entering = (tokens, *point.levels[:-1])
            removed = [before - after for before, after in zip(entering, point.levels, strict=True)]
            self._all.append(FrontEntry(self.label, Schedule(removed), point.milliseconds, point.cost))
        self.entries = _numbered(self._all)
        self.values: dict[int, float] = {len(self.entries): 1.0}

    @property
    def dense(self) -> int:
        """The number of the schedule that removes nothing."""
        return len(self.entries)

    def entry(self, number: int) -> FrontEntry:
        """The schedule of this number, with its proxy if that was measured."""
        return replace(self.entries[number - 1], accuracy=self.values.get(number))

    def everything(self) -> list[FrontEntry]:
        """The whole front from dense to the fastest, with the proxies that were measured."""
        known = {self.entries[number - 1].schedule.removed: value for number, value in self.values.items()}
        return [replace(entry, accuracy=known.get(entry.schedule.removed)) for entry in self._all]

    def __call__(self, number: int) -> float:
        """The proxy of a schedule, measured once."""
        if number not in self.values:
            self.values[number] = self._measure(self.reduction, self.entries[number - 1].schedule)
        return self.values[number]

    def choose(self, objective: Objective, max_seconds: float | None) -> tuple[int, str]:
        """The number of the best schedule, and why; see `lightning_prune.planning.choice.choose`.

        Raises:
            ArgumentError: If no schedule is predicted to keep to a budget; says what the fastest is predicted to take.
        """
        curve, fastest = self._curve(), self.entries[0]
        if objective.unreachable(curve.tokens, np.array(curve.milliseconds)) is not None:
            raise ArgumentError(
                f"The {objective} cannot be reached: the fastest schedule is predicted to take "
                f"{fastest.milliseconds:.3g} ms, {curve.dense_ms / fastest.milliseconds:.2f}x, and leaves "
                f"{fastest.schedule.tokens(self._tokens)[-1]} tokens."
            )
        if not any(curve.saves(number) for number in curve.tokens):
            gained = 100 * (1 - fastest.milliseconds / curve.dense_ms)
            return self.dense, (
                f"No schedule is predicted to be faster than dense by more than 2%; the fastest by {gained:.1f}%, its "
                f"own price included.{missed_by_dense(curve, objective)}"
            )
        return choose(curve, self, objective, exhaustive=False, max_seconds=max_seconds)

    def fastest(self) -> tuple[int, str]:
        """The number of the fastest schedule, with what to say of it; its proxy is measured."""
        return 1, f"The fastest schedule of {self.label}: {100 * self(1):.2f}% of the dense {self.name}."

    def _curve(self) -> LatencyProfile:
        """The numbered schedules as if they were token counts, known without noise."""
        count = len(self.entries)
        return LatencyProfile(
            tokens=tuple(range(1, count + 1)),
            milliseconds=tuple(entry.milliseconds for entry in self.entries),
            spread=(1e-9,) * count,
            rounds=(99,) * count,
            method=self.reduction.name,
            block=0,
            depth=self.entries[0].schedule.depth,
        )


def _numbered(entries: list[FrontEntry]) -> list[FrontEntry]:
    """From the fastest to dense; of those within half a percent of dense the slowest, which costs least."""
    dense = entries[0]
    bins = {
        int((dense.milliseconds - e.milliseconds) / (_APART * dense.milliseconds)): e for e in reversed(entries[1:])
    }
    chosen = {entry.schedule.removed: entry for entry in (entries[-1], *bins.values(), dense)}
    return list(chosen.values())
