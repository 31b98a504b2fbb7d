"""The best schedule of every method against each other, timed beside dense."""

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.block_search import BlockSearch, Variants
from lightning_prune.planning.choice import missed_by_dense, why_dense
from lightning_prune.planning.confirm import Attempt, Chosen, Confirmed
from lightning_prune.planning.given_profile import nothing_timed
from lightning_prune.planning.method_front import MethodFront
from lightning_prune.planning.objective import Objective


def decided(search: BlockSearch, fronts: Sequence[MethodFront], objective: Objective) -> tuple[MethodFront, Confirmed]:
    """The method, and the number of its schedule on its front: the best of all, timed beside dense where that can be.

    One that misses a budget is moved and timed again, and is taken only if it then keeps to it and is better than
    those that do. Where none does, it is the one that comes nearest.

    Args:
        search: Times schedules.
        fronts: Of the methods; at least one.
        objective: What makes one schedule better than another.

    Raises:
        ArgumentError: If no method can reach a budget; says the best of each.
    """
    if not any(search.curve.saves(count) for count in search.curve.tokens):
        why = why_dense(search.curve) + missed_by_dense(search.curve, objective)
        return fronts[0], Confirmed(fronts[0].dense, nothing_timed(why, search.curve) if search.foreign else why)
    chosen = _chosen(search, fronts, objective)
    if search.foreign:
        front = _best_predicted(chosen, objective)
        number, why = chosen[front]
        return front, Confirmed(number, nothing_timed(why, search.curve))
    attempts = {front: _attempt(front, choice, objective, search.max_seconds) for front, choice in chosen.items()}
    while any(attempt.next is not None for attempt in attempts.values()):
        _time(search, attempts)
        _close_hopeless(attempts)
    return best_timed(attempts, objective, search.curve.dense_ms)


def best_timed(
    attempts: Mapping[MethodFront, Attempt], objective: Objective, dense_ms: float
) -> tuple[MethodFront, Confirmed]:
    """The best of what the attempts came to, dense among them where it keeps to the budget.

    Args:
        attempts: With nothing left to try.
        objective: What makes one better than another.
        dense_ms: Latency of the unpruned model where nothing was timed.
    """
    found = {front: attempt.result() for front, attempt in attempts.items()}
    timed = {front: result for front, result in found.items() if result.pruned is not None}
    dense_ms = next((result.dense.milliseconds for result in timed.values() if result.dense is not None), dense_ms)
    stays = objective.met_by_dense(dense_ms)
    inside = [front for front, result in found.items() if (attempts[front].excess() == 1 if front in timed else stays)]
    if not inside:
        front = min(timed or found, key=lambda front: attempts[front].excess())
        return front, found[front]
    ratios = [1.0 if (pruned := found[front].pruned) is None else pruned.ratio for front in inside]
    proxy = [front(found[front].tokens) for front in inside]
    value = objective.among(dense_ms * np.array([*ratios, 1.0]), np.array([*proxy, 1.0]))
    value[-1] = value[-1] if stays else -np.inf
    place = int(np.argmax(value))
    if place < len(inside):
        return inside[place], found[inside[place]]
    front = inside[0]
    told = ", ".join(f"{each.label} {1 / ratio:.2f}x" for each, ratio in zip(inside, ratios, strict=True))
    return front, Confirmed(front.dense, f"Timed beside dense ({told}), by {objective} nothing is gained.")


def _chosen(search: BlockSearch, fronts: Sequence[MethodFront], objective: Objective) -> dict[MethodFront, Chosen]:
    """What each method would do, by its predictions; those that cannot reach a budget are left out, if any can."""
    chosen: dict[MethodFront, Chosen] = {}
    reasons: list[str] = []
    for front in fronts:
        try:
            chosen[front] = front.choose(objective, search.max_seconds)
        except ArgumentError as error:
            reasons.append(f"{front.label}: {error}")
    if not chosen:
        raise ArgumentError(" ".join(reasons))
    return chosen


def _attempt(front: MethodFront, choice: Chosen, objective: Objective, max_seconds: float) -> Attempt:
    dense_ms = front.entry(front.dense).milliseconds
    return Attempt(
        choice, front.dense, dense_ms, objective, lambda wanted: front.choose(wanted, max_seconds), front.fastest
    )


def _time(search: BlockSearch, attempts: Mapping[MethodFront, Attempt]) -> None:
    """What each attempt tries next, all in one run."""
    trying = {front: attempt.next[0] for front, attempt in attempts.items() if attempt.next is not None}
    variants: Variants = {"dense": None}
    for front, number in trying.items():
        variants[front.label] = (front.reduction, front.entry(number).schedule)
    timings = search.compare(variants)
    for front in trying:
        attempts[front].judge(timings["dense"], timings[front.label])


def _close_hopeless(attempts: Mapping[MethodFront, Attempt]) -> None:
    """Ends attempts that miss the budget and would be no better than one that keeps to it, if they did too."""
    kept = [front(a.result().tokens) for front, a in attempts.items() if a.excess() == 1 and a.result().pruned]
    for front, attempt in attempts.items():
        if kept and attempt.next is not None and attempt.excess() > 1 and front(attempt.next[0]) <= max(kept):
            attempt.close()


def _best_predicted(chosen: Mapping[MethodFront, Chosen], objective: Objective) -> MethodFront:
    """The method whose choice is best as predicted."""
    fronts = list(chosen)
    entries = [front.entry(chosen[front][0]) for front in fronts]
    dense_ms = fronts[0].entry(fronts[0].dense).milliseconds
    proxy = [front(chosen[front][0]) for front in fronts]
    value = objective.among(np.array([*(e.milliseconds for e in entries), dense_ms]), np.array([*proxy, 1.0]))
    return fronts[int(np.argmax(value[:-1]))]
