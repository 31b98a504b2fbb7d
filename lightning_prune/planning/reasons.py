"""Why nothing is removed, and which budget is missed then, in sentences."""

from collections.abc import Mapping, Sequence
from math import hypot

import numpy as np

from lightning_prune.planning.objectives import Objective
from lightning_prune.profiling import LatencyProfile, LatencyStats
from lightning_prune.profiling.latency_profile import SAVING
from lightning_prune.schedule import Schedule


def missed_budget(objective: Objective, dense_ms: float) -> str:
    """A sentence for the reason if dense misses a budget; empty if it does not."""
    return "" if objective.dense_is_feasible(dense_ms) else f" The {objective} is not met."


def dense_reason(profile: LatencyProfile) -> str | None:
    """Why no token count of a latency curve is worth having; None if one is.

    Args:
        profile: The curve.
    """
    if any(profile.is_faster_than_dense(count) for count in profile.tokens):
        return None
    fastest = profile.tokens[int(np.argmin(profile.milliseconds))]
    gained = 1 - profile.latency_ms(fastest) / profile.dense_ms
    if gained <= SAVING:
        closest = f"{fastest} tokens, by {100 * gained:.1f}%" if fastest < profile.dense_tokens else "dense itself"
        return (
            f"The curve is flat: no measured count is faster than dense by more than {SAVING:.0%} (the fastest is "
            f"{closest}). Pruning would cost accuracy for nothing."
        )
    noise = 2 * hypot(profile.stderr_ms(fastest), profile.stderr_ms(profile.dense_tokens)) / profile.dense_ms
    return (
        f"The measurement is too noisy to choose by: {fastest} tokens seem {100 * gained:.1f}% faster than dense, "
        f"within a noise of {100 * noise:.0f}%. Stop other programs on this machine, or raise `time_limit`."
    )


def no_gain(schedule: Schedule, dense_tokens: int, timing: LatencyStats) -> str | None:
    """Why a schedule is not worth using, in a sentence; None if it saves 2% or more, or removes nothing.

    Args:
        schedule: The schedule.
        dense_tokens: N.
        timing: Against dense.
    """
    if not schedule.total_removed or timing.ratio < 1 - SAVING:
        return None
    return (
        f"Timed against dense, the schedule that leaves {schedule.tokens(dense_tokens)[-1]} tokens takes "
        f"{100 * timing.ratio:.1f}% of its latency: nothing is gained."
    )


def dominated_texts(dominated: Mapping[str, tuple[Sequence[str], int]]) -> list[str]:
    """A sentence for each method that was left out as surely worse than others.

    Args:
        dominated: The method -> those others, and the number of images after which that was known.
    """
    return [
        f"Left out after {images} images, {label}: surely worse than {' and '.join(better)}."
        for label, (better, images) in dominated.items()
    ]
