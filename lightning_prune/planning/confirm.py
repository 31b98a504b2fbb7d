"""A chosen count beside dense, for real; and others where it is not what a budget asks for."""

from collections.abc import Callable
from typing import NamedTuple

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.objective import Objective
from lightning_prune.profiling import Timing
from lightning_prune.profiling.curve import SAVING

MOVES = 4  # times that another count is tried

Chosen = tuple[int, str]


class Confirmed(NamedTuple):
    """What came of it.

    Attributes:
        tokens: The count to deploy.
        reason: Why.
        dense: Timing of the unpruned model; None where nothing is removed.
        pruned: Timing of the count.
    """

    tokens: int
    reason: str
    dense: Timing | None = None
    pruned: Timing | None = None


class Attempt:
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
        self._timed: dict[int, Confirmed] = {}
        self.next: Chosen | None = None if chosen[0] == dense_tokens else chosen

    def judge(self, dense: Timing, pruned: Timing) -> None:
        """Takes the timing of `next`, in one run with dense, and moves on."""
        assert self.next is not None
        tokens, reason = self.next
        self._timed[tokens] = Confirmed(tokens, reason, dense, pruned)
        excess, faster = self._objective.excess(pruned), dense.milliseconds / self._dense_ms
        self.next = None
        if len(self._timed) > MOVES:
            return
        if excess > 1:
            self._wanted = self._wanted.tightened(excess)
            following = self._following()
            if following is None or following[0] in self._timed:
                following = self._fastest()
        elif len(self._timed) == 1 and faster < 1 - SAVING:
            self._wanted = self._objective.on_profile(faster)
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

    def result(self) -> Confirmed:
        """The last count that keeps to the budget, which is nearest to it; where none does, the fastest, which says so.

        Where removing nothing was chosen, that.
        """
        if not self._timed:
            return Confirmed(*self._chosen)
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


def confirmed(attempt: Attempt, compare: Callable[[int], tuple[Timing, Timing]]) -> Confirmed:
    """Times the chosen count, and chooses again by what it missed, a few times at most.

    Args:
        attempt: Of the method.
        compare: Times dense and a count in one interleaved run.
    """
    while attempt.next is not None:
        attempt.judge(*compare(attempt.next[0]))
    return attempt.result()
