"""Choosing a token count: where to measure the proxy, and which measured count is best."""

import time
from collections.abc import Sequence
from math import hypot
from typing import Protocol, TypeVar

import numpy as np

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.objective import Column, Objective
from lightning_prune.profiling import LatencyProfile
from lightning_prune.profiling.curve import SAVING

_FIRST = 4  # counts at which the proxy is measured before any choice
_MOST = 8  # counts at which it is measured after that
Item = TypeVar("Item")
WORTHWHILE = 0.002  # a better score by less is not worth another pass over the calibration images


class Curve(Protocol):
    """Accuracy at token counts, measured where it is asked for.

    Attributes:
        name: What the figures mean.
        values: Token count -> accuracy relative to dense, of those that were asked for.
    """

    name: str
    values: dict[int, float]

    def __call__(self, tokens: int, /) -> float:
        """The accuracy at one count."""
        ...


def choose(
    profile: LatencyProfile, curve: Curve, objective: Objective, exhaustive: bool, max_seconds: float | None
) -> tuple[int, str]:
    """The token count to deploy and why; dense where nothing is saved, or too little is known to tell.

    Args:
        profile: Latency of the candidates.
        curve: Accuracy of the candidates; measured for the few that matter.
        objective: What makes one better than another.
        exhaustive: Every count of the profile is a candidate and is measured, as in the POMT paper.
        max_seconds: When no further count is measured; the first few always are.

    Raises:
        ArgumentError: If pruning saves time, but not so much as a budget asks for.
    """
    n = profile.dense_tokens
    useful = [count for count in profile.tokens if count < n and profile.saves(count)]
    if not useful:
        return n, why_dense(profile) + missed_by_dense(profile.dense_ms, objective)
    unreachable = objective.unreachable(profile.tokens, np.array(profile.milliseconds))
    if unreachable is not None:
        raise ArgumentError(unreachable)
    # The paper's argmax is over every count; else a count that saves nothing is no candidate.
    counts = list(profile.tokens) if exhaustive else [*useful, n]
    latency = np.array([profile.at(count) for count in counts])
    if objective.unreachable(counts, latency) is not None:
        return n, why_dense(profile) + missed_by_dense(profile.dense_ms, objective)
    deadline = time.perf_counter() + (max_seconds if max_seconds is not None else float("inf"))
    for count in counts if exhaustive else spread(useful, _FIRST):
        curve(count)
    before = len(curve.values)  # what an earlier objective asked for is no reason to ask for less
    while not exhaustive and len(curve.values) - before < _MOST and time.perf_counter() < deadline:
        promising = _promising(counts, latency, curve, objective)
        if promising is None:
            break
        curve(promising)
    measured = [count for count in counts if count in curve.values]
    accuracy = np.array([curve.values[count] for count in measured])
    chosen = measured[objective.best(np.array([profile.at(count) for count in measured]), accuracy)]
    if chosen == n:
        return n, f"Dense is best by the objective ({objective}): every faster count costs too much."
    saved = 100 * (1 - profile.at(chosen) / profile.dense_ms)
    kept = 100 * curve.values[chosen]
    return chosen, f"Best by {objective}: {saved:.1f}% less latency, {kept:.2f}% of the dense {curve.name}."


def why_dense(profile: LatencyProfile) -> str:
    """Why no count is worth having: the device gains nothing, or the measurement cannot tell."""
    fastest = profile.tokens[int(np.argmin(profile.milliseconds))]
    gained = 1 - profile.at(fastest) / profile.dense_ms
    if gained <= SAVING:
        closest = f"{fastest} tokens, by {100 * gained:.1f}%" if fastest < profile.dense_tokens else "dense itself"
        return (
            f"The curve is flat: no measured count is faster than dense by more than 2% (the fastest is {closest}). "
            "Pruning would cost accuracy for nothing."
        )
    noise = 2 * hypot(profile.error(fastest), profile.error(profile.dense_tokens)) / profile.dense_ms
    return (
        f"The measurement is too noisy to choose by: {fastest} tokens seem {100 * gained:.1f}% faster than dense, "
        f"within a noise of {100 * noise:.0f}%. Stop what else runs on this machine, or raise `max_seconds`."
    )


def missed_by_dense(dense_ms: float, objective: Objective) -> str:
    """What is to be added to the reason for dense where a budget asks for more; nothing where it does not."""
    return "" if objective.met_by_dense(dense_ms) else f" The {objective} is not met."


def _promising(counts: Sequence[int], latency: Column, curve: Curve, objective: Objective) -> int | None:
    """The count to measure next: where the objective expects its best, then the gaps beside it that may hide better.

    Between measured counts the proxy is first taken to be straight. It is usually better than that, but hardly better
    than at the next larger count; a gap is entered while even this would make a difference.
    """
    known = [count for count in counts if count in curve.values]
    straight = np.interp(counts, known, [curve.values[count] for count in known])
    best = objective.best(latency, straight)
    if counts[best] not in curve.values:
        return counts[best]
    place = known.index(counts[best])
    for low, high in ((place - 1, place), (place, place + 1)):
        if low < 0 or high >= len(known):
            continue
        gap = [i for i, count in enumerate(counts) if known[low] < count < known[high]]
        hopeful = straight.copy()
        hopeful[gap] = curve.values[known[high]]
        score = objective.score(latency, hopeful)
        if gap and score[gap].max() > score[best] + WORTHWHILE:
            return counts[gap[len(gap) // 2]]
    return None


def spread(candidates: Sequence[Item], most: int) -> list[Item]:
    """A few of them spread over all, the first and the last among them: budgets live near dense."""
    positions = np.linspace(0, len(candidates) - 1, min(most, len(candidates))).round().astype(int)
    return [candidates[position] for position in dict.fromkeys(positions.tolist())]
