"""The best schedule of every method against each other, timed beside dense."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.block_search import BlockSearch, Variants
from lightning_prune.planning.blocks_plan import FrontEntry
from lightning_prune.planning.choice import WORTHWHILE, missed_by_dense, why_dense
from lightning_prune.planning.confirm import MOVES
from lightning_prune.planning.given_profile import nothing_timed
from lightning_prune.planning.method_front import MethodFront
from lightning_prune.planning.objective import Objective
from lightning_prune.profiling import Timing

_NEARLY = 0.1  # of a budget: what is predicted to miss it by no more may keep to it all the same


class Finalist(NamedTuple):
    """A schedule of a method, and what came of timing it.

    Attributes:
        front: Of the method.
        entry: The schedule, as predicted when it was chosen.
        reason: Why it was.
        dense: Timing of the unpruned model in the same run; None where nothing was timed.
        pruned: Timing of the schedule.
    """

    front: MethodFront
    entry: FrontEntry
    reason: str
    dense: Timing | None = None
    pruned: Timing | None = None

    @property
    def removes(self) -> bool:
        """Whether it removes any token."""
        return self.entry.schedule.total > 0

    def ratio(self) -> float:
        """Latency over dense, as timed, else as predicted."""
        return self.front.ratio(self.entry) if self.pruned is None else self.pruned.ratio


def decided(search: BlockSearch, fronts: Sequence[MethodFront], objective: Objective) -> Finalist:
    """The best schedule of all methods, timed beside dense where that can be.

    Every method proposes what is best by its predictions. What is timed teaches it: it proposes again, where that
    promises more than the best that was timed so far, a few times at most and within twice the time limit. Of a budget
    of latency only what keeps to it when timed is taken; while nothing does, methods that are predicted to miss it by
    little are tried by their fastest schedule, too, and where nothing does in the end, it is what comes nearest.

    Args:
        search: Times schedules.
        fronts: Of the methods; at least one. They keep what they learn.
        objective: What makes one schedule better than another.

    Raises:
        ArgumentError: If no method can reach a budget; says the best of each.
    """
    if not any(search.curve.saves(count) for count in search.curve.tokens):
        why = why_dense(search.curve) + missed_by_dense(search.dense_ms, objective)
        return Finalist(fronts[0], fronts[0].dense, nothing_timed(why, search.curve) if search.foreign else why)
    proposed, missing = _proposed(search, fronts, objective, search.max_seconds)
    if search.foreign and proposed:
        best = proposed[int(np.argmax(_values(proposed, objective, search.dense_ms)[:-1]))]
        return best._replace(reason=nothing_timed(best.reason, search.curve))
    trying = [each for each in proposed if each.removes]
    if not proposed and not search.foreign:
        trying = _nearly(missing, objective, search.dense_ms)
    if not trying:
        return _first_of(proposed, missing)
    timed: list[Finalist] = []
    deadline = time.perf_counter() + 2 * search.max_seconds
    for run in range(1 + MOVES):
        timed += _timed(search, trying)
        left = deadline - time.perf_counter()
        if run == MOVES or left < 0:
            break
        following, still_missing = _proposed(search, fronts, objective, left)
        trying = [each for each in following if _promises(each, timed, objective, search.dense_ms)]
        if not trying and not _inside(timed, objective):
            trying = _nearly(fronts, objective, search.dense_ms, timed)
        if not trying:
            if not proposed and not _inside(timed, objective):  # nobody expected more
                return _first_of(following, still_missing)
            break
    return best_timed(timed, objective, search.dense_ms)


def best_timed(timed: Sequence[Finalist], objective: Objective, dense_ms: float) -> Finalist:
    """The best of what was timed, dense where that is better and keeps to the budget.

    Args:
        timed: At least one; the later ones of a method are not better for that.
        objective: What makes one better than another.
        dense_ms: Latency of the unpruned model.
    """
    inside = _inside(timed, objective)
    if not inside and not objective.met_by_dense(dense_ms):
        return _nearest(timed, objective)
    place = int(np.argmax(_values(inside, objective, dense_ms)))
    if place < len(inside):
        return inside[place]
    fastest = {f.front.label: f.ratio() for f in sorted(timed, key=Finalist.ratio, reverse=True)}
    told = ", ".join(f"{label} {1 / ratio:.2f}x" for label, ratio in fastest.items())
    front = timed[0].front
    return Finalist(front, front.dense, f"Timed beside dense ({told}), by {objective} nothing is gained.")


def _proposed(
    search: BlockSearch, fronts: Sequence[MethodFront], objective: Objective, max_seconds: float
) -> tuple[list[Finalist], dict[MethodFront, str]]:
    """What each method would do, by its predictions, and why others cannot reach a budget."""
    found: list[Finalist] = []
    missing: dict[MethodFront, str] = {}
    for front in fronts:
        try:
            found.append(Finalist(front, *front.choose(objective, search.dense_ms, max_seconds)))
        except ArgumentError as error:
            missing[front] = f"{front.label}: {error}"
    return found, missing


def _first_of(proposed: Sequence[Finalist], missing: Mapping[MethodFront, str]) -> Finalist:
    """Dense, as all that is proposed; an error with all reasons where nothing is."""
    if not proposed:
        raise ArgumentError(" ".join(missing.values()))
    return proposed[0]


def _nearly(
    fronts: Iterable[MethodFront], objective: Objective, dense_ms: float, timed: Sequence[Finalist] = ()
) -> list[Finalist]:
    """The fastest schedules of methods, not timed yet, that are predicted to miss a budget by little, if at all."""
    found = []
    for front in fronts:
        entry = front.entries[0]
        ratios = np.array([front.ratio(entry) / (1 + _NEARLY), 1.0])
        near = objective.unreachable((1, 2), dense_ms * ratios) is None
        if near and entry.schedule.total and (front.label, entry.schedule.removed) not in _seen(timed):
            found.append(Finalist(front, *front.fastest()))
    return found


def _timed(search: BlockSearch, trying: Iterable[Finalist]) -> list[Finalist]:
    """The same with their timings, all of one run, from which the fronts learn."""
    variants: Variants = {"dense": None}
    variants |= {each.front.label: (each.front.reduction, each.entry.schedule) for each in trying}
    timings = search.compare(variants)
    found = [each._replace(dense=timings["dense"], pruned=timings[each.front.label]) for each in trying]
    for each in found:
        each.front.observe(each.entry, timings[each.front.label])
    return found


def _promises(new: Finalist, timed: Sequence[Finalist], objective: Objective, dense_ms: float) -> bool:
    """Whether a proposal may be better than all that was timed."""
    if not new.removes or (new.front.label, new.entry.schedule.removed) in _seen(timed):
        return False
    *known, value, _ = _values([*_inside(timed, objective), new], objective, dense_ms)
    return bool(value > max(known, default=-np.inf) + WORTHWHILE)


def _seen(timed: Iterable[Finalist]) -> set[tuple[str, tuple[int, ...]]]:
    return {(each.front.label, each.entry.schedule.removed) for each in timed}


def _inside(timed: Iterable[Finalist], objective: Objective) -> list[Finalist]:
    return [each for each in timed if each.pruned is not None and objective.excess(each.pruned) == 1]


def _nearest(timed: Sequence[Finalist], objective: Objective) -> Finalist:
    """What misses a budget by least, and says so."""
    excess = {index: objective.excess(f.pruned) for index, f in enumerate(timed) if f.pruned is not None}
    index = min(excess, key=excess.__getitem__)
    nearest = timed[index]
    return nearest._replace(
        reason=f"{nearest.reason} Timed beside dense it takes {100 * (excess[index] - 1):.1f}% longer than the "
        f"{objective}: {1 / nearest.ratio():.2f}x is the best of the {len(timed)} that were timed."
    )


def _values(finalists: Sequence[Finalist], objective: Objective, dense_ms: float) -> list[float]:
    """What each is worth, and dense, the last; nothing what is slower than dense, and dense where it misses a budget.

    Latencies are cut at that of dense, so that the value of one does not depend on how slow another is.
    """
    ratios = np.array([*(each.ratio() for each in finalists), 1.0])
    proxy = np.array([*(each.front.accuracy(each.entry) for each in finalists), 1.0])
    values = objective.among(dense_ms * np.minimum(ratios, 1.0), proxy)
    values[ratios > 1] = -np.inf
    if not objective.met_by_dense(dense_ms):
        values[[*(not each.removes for each in finalists), True]] = -np.inf
    return [float(value) for value in values]
