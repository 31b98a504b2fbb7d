"""Looking closer at the latency around the best count, down to single tokens where that can make a difference."""

from collections.abc import Callable, Sequence

import numpy as np

from lightning_prune.planning.choice import WORTHWHILE
from lightning_prune.planning.objective import Column, Objective
from lightning_prune.planning.proxy_curve import ProxyCurve
from lightning_prune.profiling import LatencyProfile

_LOOKS = 8  # at most; a gap of the coarse grid is halved three or four times to be down to single tokens

Measure = Callable[[Sequence[int]], LatencyProfile]


def refine(
    profile: LatencyProfile, curve: ProxyCurve, objective: Objective, measure: Measure, in_time: Callable[[], bool]
) -> LatencyProfile:
    """The profile with more counts around the one that the objective prefers.

    Between measured counts the proxy is taken to be straight; that is exact enough for where to look, and what is
    chosen in the end is measured.

    Args:
        profile: The latency curve so far.
        curve: The accuracy that was measured so far.
        objective: What makes one count better than another.
        measure: Measures counts, beside others that they are to be compared with.
        in_time: Whether there is time for another look.
    """
    for _ in range(_LOOKS):
        beside = hopeful(profile, curve.values, objective)
        if not beside or not in_time():
            break
        profile = profile.joined(measure(sorted({count for gap in beside for count in (*gap, sum(gap) // 2)})))
    return profile


def hopeful(profile: LatencyProfile, accuracy: dict[int, float], objective: Objective) -> list[tuple[int, int]]:
    """The gaps beside the best count, as (below, above), that may hide a better one.

    At best a gap is as fast as its lower end everywhere, with a cliff right below its upper end, and there as accurate
    as that.

    Args:
        profile: The latency curve.
        accuracy: Token count -> proxy relative to dense.
        objective: What makes one count better than another.
    """
    tokens = [count for count in profile.tokens if profile.saves(count)]
    if not tokens:
        return []
    tokens.append(profile.dense_tokens)
    latency = np.array([profile.at(count) for count in tokens])
    known = sorted(accuracy)
    proxy = np.interp(tokens, known, [accuracy[count] for count in known])
    best = objective.best(latency, proxy)
    now = objective.score(latency, proxy)[best]
    found: list[tuple[int, int]] = []
    for below, above in ((best - 1, best), (best, best + 1)):
        if below < 0 or above >= len(tokens) or tokens[above] - tokens[below] < 2:
            continue
        if _with(objective, latency, proxy, latency[below], proxy[above]) > now + WORTHWHILE:
            found.append((tokens[below], tokens[above]))
    return found


def _with(objective: Objective, latency: Column, proxy: Column, milliseconds: float, accuracy: float) -> float:
    """The score of one more point; dense stays the last."""
    return float(objective.score(np.insert(latency, 0, milliseconds), np.insert(proxy, 0, accuracy))[0])
