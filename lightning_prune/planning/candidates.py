"""Candidate schedules of all methods, timed against dense."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.multi_block import BlockSearch, MethodFront, Variants
from lightning_prune.planning.objectives import Objective
from lightning_prune.planning.profile_validation import nothing_timed
from lightning_prune.planning.results import FrontEntry
from lightning_prune.planning.single_block import MOVES, WORTHWHILE, missed_by_dense, why_dense
from lightning_prune.profiling import LatencyStats

_NEARLY = 0.1  # of a budget: what is predicted to miss it by no more may keep to it all the same


class Candidate(NamedTuple):
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
    dense: LatencyStats | None = None
    pruned: LatencyStats | None = None

    @property
    def removes(self) -> bool:
        """Whether it removes any token."""
        return self.entry.schedule.total_removed > 0

    def ratio(self) -> float:
        """Latency over dense, as timed, else as predicted."""
        return self.front.ratio(self.entry) if self.pruned is None else self.pruned.ratio


def decided(search: BlockSearch, fronts: Sequence[MethodFront], objective: Objective) -> Candidate:
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
    if not any(search.curve.is_faster_than_dense(count) for count in search.curve.tokens):
        why = why_dense(search.curve) + missed_by_dense(search.dense_ms, objective)
        return Candidate(fronts[0], fronts[0].dense, nothing_timed(why, search.curve) if search.foreign else why)
    proposed, missing = _proposed(search, fronts, objective, search.time_limit)
    if search.foreign and proposed:
        best = proposed[int(np.argmax(_values(proposed, objective, search.dense_ms)[:-1]))]
        return best._replace(reason=nothing_timed(best.reason, search.curve))
    trying = [each for each in proposed if each.removes]
    if not proposed and not search.foreign:
        trying = _nearly(missing, objective, search.dense_ms)
    if not trying:
        return _first_of(proposed, missing)
    timed: list[Candidate] = []
    deadline = time.perf_counter() + 2 * search.time_limit
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


def best_timed(timed: Sequence[Candidate], objective: Objective, dense_ms: float) -> Candidate:
    """The best of what was timed, dense where that is better and keeps to the budget.

    Args:
        timed: At least one; the later ones of a method are not better for that.
        objective: What makes one better than another.
        dense_ms: Latency of the unpruned model.
    """
    inside = _inside(timed, objective)
    if not inside and not objective.dense_is_feasible(dense_ms):
        return _nearest(timed, objective)
    place = int(np.argmax(_values(inside, objective, dense_ms)))
    if place < len(inside):
        return inside[place]
    fastest = {f.front.label: f.ratio() for f in sorted(timed, key=Candidate.ratio, reverse=True)}
    told = ", ".join(f"{label} {1 / ratio:.2f}x" for label, ratio in fastest.items())
    front = timed[0].front
    return Candidate(front, front.dense, f"Timed beside dense ({told}), by {objective} nothing is gained.")


def _proposed(
    search: BlockSearch, fronts: Sequence[MethodFront], objective: Objective, time_limit: float
) -> tuple[list[Candidate], dict[MethodFront, str]]:
    """What each method would do, by its predictions, and why others cannot reach a budget."""
    found: list[Candidate] = []
    missing: dict[MethodFront, str] = {}
    for front in fronts:
        try:
            found.append(Candidate(front, *front.choose(objective, search.dense_ms, time_limit)))
        except ArgumentError as error:
            missing[front] = f"{front.label}: {error}"
    return found, missing


def _first_of(proposed: Sequence[Candidate], missing: Mapping[MethodFront, str]) -> Candidate:
    """Dense, as all that is proposed; an error with all reasons where nothing is."""
    if not proposed:
        raise ArgumentError(" ".join(missing.values()))
    return proposed[0]


def _nearly(
    fronts: Iterable[MethodFront], objective: Objective, dense_ms: float, timed: Sequence[Candidate] = ()
) -> list[Candidate]:
    """The fastest schedules of methods, not timed yet, that are predicted to miss a budget by little, if at all."""
    found = []
    for front in fronts:
        entry = front.entries[0]
        ratios = np.array([front.ratio(entry) / (1 + _NEARLY), 1.0])
        near = objective.unreachable((1, 2), dense_ms * ratios) is None
        if near and entry.schedule.total_removed and (front.label, entry.schedule.removed) not in _seen(timed):
            found.append(Candidate(front, *front.fastest()))
    return found


def _timed(search: BlockSearch, trying: Iterable[Candidate]) -> list[Candidate]:
    """The same with their timings, all of one run, from which the fronts learn."""
    variants: Variants = {"dense": None}
    variants |= {each.front.label: (each.front.reduction, each.entry.schedule) for each in trying}
    timings = search.compare(variants)
    found = [each._replace(dense=timings["dense"], pruned=timings[each.front.label]) for each in trying]
    for each in found:
        each.front.observe(each.entry, timings[each.front.label])
    return found


def _promises(new: Candidate, timed: Sequence[Candidate], objective: Objective, dense_ms: float) -> bool:
    """Whether a proposal may be better than all that was timed."""
    if not new.removes or (new.front.label, new.entry.schedule.removed) in _seen(timed):
        return False
    *known, value, _ = _values([*_inside(timed, objective), new], objective, dense_ms)
    return bool(value > max(known, default=-np.inf) + WORTHWHILE)


def _seen(timed: Iterable[Candidate]) -> set[tuple[str, tuple[int, ...]]]:
    return {(each.front.label, each.entry.schedule.removed) for each in timed}


def _inside(timed: Iterable[Candidate], objective: Objective) -> list[Candidate]:
    return [each for each in timed if each.pruned is not None and objective.excess(each.pruned) == 1]


def _nearest(timed: Sequence[Candidate], objective: Objective) -> Candidate:
    """What misses a budget by least, and says so."""
    excess = {index: objective.excess(f.pruned) for index, f in enumerate(timed) if f.pruned is not None}
    index = min(excess, key=excess.__getitem__)
    nearest = timed[index]
    return nearest._replace(
        reason=f"{nearest.reason} Timed beside dense it takes {100 * (excess[index] - 1):.1f}% longer than the "
        f"{objective}: {1 / nearest.ratio():.2f}x is the best of the {len(timed)} that were timed."
    )


def _values(finalists: Sequence[Candidate], objective: Objective, dense_ms: float) -> list[float]:
    """What each is worth, and dense, the last; nothing what is slower than dense, and dense where it misses a budget.

    Latencies are cut at that of dense, so that the value of one does not depend on how slow another is.
    """
    ratios = np.array([*(each.ratio() for each in finalists), 1.0])
    proxy = np.array([*(each.front.accuracy(each.entry) for each in finalists), 1.0])
    values = objective.among(dense_ms * np.minimum(ratios, 1.0), proxy)
    values[ratios > 1] = -np.inf
    if not objective.dense_is_feasible(dense_ms):
        values[[*(not each.removes for each in finalists), True]] = -np.inf
    return [float(value) for value in values]


class ParetoPoint(NamedTuple):
    """A schedule of a method.

    Attributes:
        front: Of the method.
        entry: The schedule.
        ratio: Its latency over dense, timed or predicted.
        accuracy: Its proxy, measured or estimated.
    """

    front: MethodFront
    entry: FrontEntry
    ratio: float
    accuracy: float


def ladder(fronts: Sequence[MethodFront], decided: Iterable[Candidate]) -> list[ParetoPoint]:
    """Schedules of all methods, from the slowest to the fastest, none of them beaten in both latency and proxy.

    Args:
        fronts: Of the methods.
        decided: What was decided after it had been timed, which none that is merely predicted drives out.
    """
    firm = _unbeaten(ParetoPoint(f.front, f.entry, f.ratio(), f.front.accuracy(f.entry)) for f in decided if f.removes)
    predicted = [
        ParetoPoint(front, entry, front.ratio(entry), front.estimate(entry))
        for front in fronts
        for entry in front.entries
        if entry.schedule.total_removed
    ]
    fitting = [rung for rung in predicted if not any(_beats(rung, each) or _beats(each, rung) for each in firm)]
    return _unbeaten([*firm, *fitting])


def _beats(one: ParetoPoint, other: ParetoPoint) -> bool:
    return one.ratio <= other.ratio and one.accuracy >= other.accuracy


def _unbeaten(rungs: Iterable[ParetoPoint]) -> list[ParetoPoint]:
    found: list[ParetoPoint] = []
    for rung in sorted(rungs, key=lambda rung: (rung.ratio, -rung.accuracy)):
        if not found or rung.accuracy > found[-1].accuracy:
            found.append(rung)
    return found[::-1]
