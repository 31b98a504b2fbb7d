"""Choosing how many tokens one block removes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import hypot
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import allocate_schedule
from lightning_prune.planning.objectives import Column, Objective
from lightning_prune.profiling import LatencyProfile, LatencyStats, compare_latency, profile_latency
from lightning_prune.profiling.accuracy_proxy import ProxyCurve
from lightning_prune.profiling.latency_profile import SAVING
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

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
    profile: LatencyProfile, curve: Curve, objective: Objective, exhaustive: bool, time_limit: float | None
) -> tuple[int, str]:
    """The token count to deploy and why; dense where nothing is saved, or too little is known to tell.

    Args:
        profile: Latency of the candidates.
        curve: Accuracy of the candidates; measured for the few that matter.
        objective: What makes one better than another.
        exhaustive: Every count of the profile is a candidate and is measured, as in the POMT paper.
        time_limit: When no further count is measured; the first few always are.

    Raises:
        ArgumentError: If pruning saves time, but not so much as a budget asks for.
    """
    n = profile.dense_tokens
    useful = [count for count in profile.tokens if count < n and profile.is_faster_than_dense(count)]
    if not useful:
        return n, why_dense(profile) + missed_by_dense(profile.dense_ms, objective)
    unreachable = objective.unreachable(profile.tokens, np.array(profile.milliseconds))
    if unreachable is not None:
        raise ArgumentError(unreachable)
    # The paper's argmax is over every count; else a count that saves nothing is no candidate.
    counts = list(profile.tokens) if exhaustive else [*useful, n]
    latency = np.array([profile.latency_ms(count) for count in counts])
    if objective.unreachable(counts, latency) is not None:
        return n, why_dense(profile) + missed_by_dense(profile.dense_ms, objective)
    deadline = time.perf_counter() + (time_limit if time_limit is not None else float("inf"))
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
    chosen = measured[objective.best(np.array([profile.latency_ms(count) for count in measured]), accuracy)]
    if chosen == n:
        return n, f"Dense is best by the objective ({objective}): every faster count costs too much."
    saved = 100 * (1 - profile.latency_ms(chosen) / profile.dense_ms)
    kept = 100 * curve.values[chosen]
    return chosen, f"Best by {objective}: {saved:.1f}% less latency, {kept:.2f}% of the dense {curve.name}."


def why_dense(profile: LatencyProfile) -> str:
    """Why no count is worth having: the device gains nothing, or the measurement cannot tell."""
    fastest = profile.tokens[int(np.argmin(profile.milliseconds))]
    gained = 1 - profile.latency_ms(fastest) / profile.dense_ms
    if gained <= SAVING:
        closest = f"{fastest} tokens, by {100 * gained:.1f}%" if fastest < profile.dense_tokens else "dense itself"
        return (
            f"The curve is flat: no measured count is faster than dense by more than 2% (the fastest is {closest}). "
            "Pruning would cost accuracy for nothing."
        )
    noise = 2 * hypot(profile.stderr_ms(fastest), profile.stderr_ms(profile.dense_tokens)) / profile.dense_ms
    return (
        f"The measurement is too noisy to choose by: {fastest} tokens seem {100 * gained:.1f}% faster than dense, "
        f"within a noise of {100 * noise:.0f}%. Stop what else runs on this machine, or raise `time_limit`."
    )


def missed_by_dense(dense_ms: float, objective: Objective) -> str:
    """What is to be added to the reason for dense where a budget asks for more; nothing where it does not."""
    return "" if objective.dense_is_feasible(dense_ms) else f" The {objective} is not met."


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
        promising_gaps = straight.copy()
        promising_gaps[gap] = curve.values[known[high]]
        score = objective.score(latency, promising_gaps)
        if gap and score[gap].max() > score[best] + WORTHWHILE:
            return counts[gap[len(gap) // 2]]
    return None


def spread(candidates: Sequence[Item], most: int) -> list[Item]:
    """A few of them spread over all, the first and the last among them: budgets live near dense."""
    positions = np.linspace(0, len(candidates) - 1, min(most, len(candidates))).round().astype(int)
    return [candidates[position] for position in dict.fromkeys(positions.tolist())]


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
        beside = promising_gaps(profile, curve.values, objective)
        if not beside or not in_time():
            break
        profile = profile.merged_with(measure(sorted({count for gap in beside for count in (*gap, sum(gap) // 2)})))
    return profile


def promising_gaps(profile: LatencyProfile, accuracy: dict[int, float], objective: Objective) -> list[tuple[int, int]]:
    """The gaps beside the best count, as (below, above), that may hide a better one.

    At best a gap is as fast as its lower end everywhere, with a cliff right below its upper end, and there as accurate
    as that.

    Args:
        profile: The latency curve.
        accuracy: Token count -> proxy relative to dense.
        objective: What makes one count better than another.
    """
    tokens = [count for count in profile.tokens if profile.is_faster_than_dense(count)]
    if not tokens:
        return []
    tokens.append(profile.dense_tokens)
    latency = np.array([profile.latency_ms(count) for count in tokens])
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


MOVES = 4  # times that another count is tried

Chosen = tuple[int, str]


class TimedChoice(NamedTuple):
    """What came of it.

    Attributes:
        tokens: The count to deploy.
        reason: Why.
        dense: Timing of the unpruned model; None where nothing is removed.
        pruned: Timing of the count.
    """

    tokens: int
    reason: str
    dense: LatencyStats | None = None
    pruned: LatencyStats | None = None


class BudgetSearch:
    """One method on its way into a budget: what was timed of it, and what to time next.

    A count that turns out too slow is followed by one that is so much faster on the profile, in the end by the fastest
    of all. One that keeps to a budget of milliseconds only because the machine is faster than when the profile was made
    is followed by what the budget allows now.

    Args:
        chosen: The count and why.
        dense_tokens: N.
        dense_ms: Latency of the unpruned model on the profile.
        objective: What was asked for.
        choose: Chooses by an objective, on the profile; ArgumentError where nothing can be chosen.
        fastest: The fastest count on the profile, and what to say of it.

    Attributes:
        next: The count to time next, and why; None where nothing is left to try.
    """

    def __init__(
        self,
        chosen: Chosen,
        dense_tokens: int,
        dense_ms: float,
        objective: Objective,
        choose: Callable[[Objective], Chosen],
        fastest: Callable[[], Chosen],
    ) -> None:
        self._chosen, self._dense_tokens, self._dense_ms = chosen, dense_tokens, dense_ms
        self._objective, self._wanted = objective, objective
        self._choose, self._fastest = choose, fastest
        self._timed: dict[int, TimedChoice] = {}
        self.next: Chosen | None = None if chosen[0] == dense_tokens else chosen

    def judge(self, dense: LatencyStats, pruned: LatencyStats) -> None:
        """Takes the timing of `next`, in one run with dense, and moves on."""
        assert self.next is not None
        tokens, reason = self.next
        self._timed[tokens] = TimedChoice(tokens, reason, dense, pruned)
        excess, faster = self._objective.excess(pruned), dense.milliseconds / self._dense_ms
        self.next = None
        if len(self._timed) > MOVES:
            return
        if excess > 1:
            self._wanted = self._wanted.tighten(excess)
            following = self._following()
            if following is None or following[0] in self._timed:
                following = self._fastest()
        elif len(self._timed) == 1 and faster < 1 - SAVING:
            self._wanted = self._objective.rescale(faster)
            following = self._following()
        else:
            return
        if following is not None and following[0] not in self._timed and following[0] != self._dense_tokens:
            self.next = following

    def close(self) -> None:
        """Tries nothing more."""
        self.next = None

    def excess(self) -> float:
        """By what factor the result is slower than was asked for; 1 where it is not."""
        pruned = self.result().pruned
        return 1.0 if pruned is None else self._objective.excess(pruned)

    def result(self) -> TimedChoice:
        """The last count that keeps to the budget, which is nearest to it; where none does, the fastest, which says so.

        Where removing nothing was chosen, that.
        """
        if not self._timed:
            return TimedChoice(*self._chosen)
        inside = [each for each in self._timed.values() if each.pruned and self._objective.excess(each.pruned) == 1]
        if inside:
            return inside[-1]
        nearest = min(
            self._timed.values(), key=lambda each: self._objective.excess(each.pruned) if each.pruned else 1.0
        )
        assert nearest.pruned is not None
        over = 100 * (self._objective.excess(nearest.pruned) - 1)
        told = (
            f" Timed beside dense it takes {over:.1f}% longer than the {self._objective}: "
            f"{1 / nearest.pruned.ratio:.2f}x is the best of the {len(self._timed)} that were timed."
        )
        return nearest._replace(reason=nearest.reason + told)

    def _following(self) -> Chosen | None:
        """What is to be tried by the objective as it stands; None where nothing can be chosen by it."""
        try:
            following = self._choose(self._wanted)
        except ArgumentError:
            return None
        return None if following[0] == self._dense_tokens else following


def confirmed(attempt: BudgetSearch, compare: Callable[[int], tuple[LatencyStats, LatencyStats]]) -> TimedChoice:
    """Times the chosen count, and chooses again by what it missed, a few times at most.

    Args:
        attempt: Of the method.
        compare: Times dense and a count in one interleaved run.
    """
    while attempt.next is not None:
        attempt.judge(*compare(attempt.next[0]))
    return attempt.result()


@dataclass(frozen=True)
class OnDevice:
    """A method of a model on the device that the batch is on.

    Attributes:
        model: The module that contains the Vision Transformer, dense.
        batch: (B, channels, height, width) images on the device.
        reduction: The method.
        block: As `lightning_prune.profiling.reducing_block` says it.
        tokens: N.
        prefix_tokens: P.
        depth: Blocks.
        time_limit: Time limit of a profile; None is the paper's.
        target: Dotted path of the transformer in `model`.
        progress: Shows bars on a terminal.
    """

    model: nn.Module
    batch: Tensor
    reduction: Reduction
    block: int
    tokens: int
    prefix_tokens: int
    depth: int
    time_limit: float | None
    target: str | None
    progress: bool

    def schedule(self, count: int) -> Schedule:
        """What leaves so many tokens."""
        remove = self.tokens - count
        return allocate_schedule(self.reduction, remove, self.tokens, self.prefix_tokens, self.depth, self.block)

    def measure(self, counts: Sequence[int]) -> LatencyProfile:
        """The latency of these counts and dense, in a run of its own."""
        return profile_latency(
            self.model,
            self.batch,
            method=self.reduction,
            block=self.block,
            counts=counts,
            time_limit=(self.time_limit or 30.0) / 8,
            module_path=self.target,
            verbose=self.progress,
        )

    def compare(self, count: int) -> tuple[LatencyStats, LatencyStats]:
        """Dense and a count in one interleaved run."""
        timings = compare_latency(
            self.model,
            self.batch,
            {"dense": None, "pruned": (self.reduction, self.schedule(count))},
            time_limit=20.0 if self.time_limit is None else max(1.0, self.time_limit / 3),
            module_path=self.target,
            verbose=self.progress,
        )
        return timings["dense"], timings["pruned"]
