"""The best schedule of every method against each other, timed beside dense."""

from collections.abc import Iterable, Sequence
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
    promises more than the best that was timed so far, a few times at most. Of a budget of latency only what keeps to it
    when timed is taken, and where nothing does, what comes nearest.

    Args:
        search: Times schedules.
        fronts: Of the methods; at least one.
        objective: What makes one schedule better than another.

    Raises:
        ArgumentError: If no method can reach a budget; says the best of each.
    """
    if not any(search.curve.saves(count) for count in search.curve.tokens):
        why = why_dense(search.curve) + missed_by_dense(search.curve, objective)
        return Finalist(fronts[0], fronts[0].dense, nothing_timed(why, search.curve) if search.foreign else why)
    dense_ms = search.curve.dense_ms
    proposed = _proposed(search, fronts, objective)
    if search.foreign:
        best = proposed[int(np.argmax(_values(proposed, objective, dense_ms)[:-1]))]
        return best._replace(reason=nothing_timed(best.reason, search.curve))
    timed: list[Finalist] = []
    trying = [each for each in proposed if each.removes]
    for _ in range(1 + MOVES):
        if not trying:
            break
        timed += _timed(search, trying)
        dense = timed[-1].dense
        assert dense is not None
        dense_ms = dense.milliseconds
        proposed = [_following(search, front, objective, dense_ms) for front in dict.fromkeys(f.front for f in timed)]
        trying = [each for each in proposed if _promises(each, timed, objective, dense_ms)]
    return best_timed(timed, objective, dense_ms) if timed else proposed[0]


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


def _proposed(search: BlockSearch, fronts: Sequence[MethodFront], objective: Objective) -> list[Finalist]:
    """What each method would do, by its predictions; those that cannot reach a budget are left out, if any can."""
    found: list[Finalist] = []
    reasons: list[str] = []
    for front in fronts:
        try:
            found.append(Finalist(front, *front.choose(objective, search.curve.dense_ms, search.max_seconds)))
        except ArgumentError as error:
            reasons.append(f"{front.label}: {error}")
    if not found:
        raise ArgumentError(" ".join(reasons))
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


def _following(search: BlockSearch, front: MethodFront, objective: Objective, dense_ms: float) -> Finalist:
    """What a method would do after all; its fastest schedule where it is now predicted to miss a budget.

    Proxies are known by then: there is time for one more, and a few if they are quick.
    """
    try:
        return Finalist(front, *front.choose(objective, dense_ms, search.max_seconds / 4))
    except ArgumentError:
        return Finalist(front, *front.fastest())


def _promises(new: Finalist, timed: Sequence[Finalist], objective: Objective, dense_ms: float) -> bool:
    """Whether a proposal may be better than all that was timed."""
    seen = {(each.front.label, each.entry.schedule.removed) for each in timed}
    if not new.removes or (new.front.label, new.entry.schedule.removed) in seen:
        return False
    inside = _inside(timed, objective)
    if not inside:
        return True
    *known, value = _values([*inside, new], objective, dense_ms)[:-1]
    return bool(value > max(known) + WORTHWHILE)


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
    """What each is worth, and dense, the last; dense nothing where it does not keep to the budget."""
    ratios = np.array([*(each.ratio() for each in finalists), 1.0])
    proxy = np.array([*(each.front.accuracy(each.entry) for each in finalists), 1.0])
    values = objective.among(dense_ms * ratios, proxy)
    if not objective.met_by_dense(dense_ms):
        values[-1] = -np.inf
    return [float(value) for value in values]
