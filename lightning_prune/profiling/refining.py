"""Where a latency profile may still hide a cliff, and which of its counts are not known well enough."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_prune.profiling.curve import LatencyProfile, Span

_DECIDED = 31  # rounds after which a step that may hide a cliff is looked into
_ENOUGH = 63  # rounds of a count, after which it is taken as it is
_MOST = 40  # counts, refinement included
_AT_ONCE = 4  # steps that are refined before the next look at all of them
_PRECISION = 0.007  # of the dense latency: standard error at which a count is known well enough
_SOUGHT = 0.042  # of the dense latency: what a token must save to be looked for, with room for cliffs of 5%
_SURE = 2.0  # standard errors


@dataclass
class Refining:
    """Where to look for cliffs next.

    Attributes:
        grid: The coarse grid, which lies where tiles may end.
        open: Whether there is anything left to look for.
        cut: Whether there was, but no time.
        lucky: Looks just above a count of the grid that were right, less those that were not.
        looked: Counts of the grid that were looked above, and of which it is not known yet.
    """

    grid: frozenset[int]
    open: bool
    cut: bool = False
    lucky: int = 0
    looked: set[int] = field(default_factory=set)

    def next(self, profile: LatencyProfile, affordable: int) -> list[int]:
        """Counts to measure: none when every step is known to hide no cliff, or nothing more may be measured.

        Args:
            profile: What is known.
            affordable: For how many more counts there is time.
        """
        if not self.open:
            return []
        for below in sorted(self.looked):
            self._judge(profile, below)
        wide = [step for step in profile.steps() if step.above - step.below > 1]
        hiding = [step for step in wide if hides(profile, step) is not False]
        room = min(_AT_ONCE, _MOST - len(profile.tokens), affordable)
        self.cut = bool(hiding) and affordable < 1
        self.open = bool(hiding) and room > 0
        largest = sorted(hiding, key=lambda step: step.saved, reverse=True)[: max(room, 0)]
        return [self._within(step) for step in largest if hides(profile, step)]

    def _within(self, step: Span) -> int:
        """The middle, or just above the lower end where cliffs were found to be there."""
        unproven = self.lucky < 0 or (self.lucky == 0 and bool(self.looked))
        if unproven or not {step.above, step.below} <= self.grid:
            return (step.above + step.below) // 2
        self.looked.add(step.below)
        return step.below + 1

    def _judge(self, profile: LatencyProfile, below: int) -> None:
        """Whether the token just above `below` has most of what the step that it was part of saved."""
        step = next(s for s in profile.steps() if s.below == below)
        if step.above == below + 1:
            self.lucky += 1 if step.saved > _SOUGHT * profile.dense_ms else -1
            self.looked.discard(below)


def hides(profile: LatencyProfile, step: Span) -> bool | None:
    """Whether a step saves enough to hide a cliff, as all that it saves may be saved by one token; None: not known.

    After many rounds one that may is taken for one that does: a count too many costs less than a cliff too few.
    """
    beyond, noise = step.saved - _SOUGHT * profile.dense_ms, profile.noise(step)
    known = min(_rounds(profile, step)) >= _DECIDED
    if beyond < -_SURE * noise:
        return False
    return True if known or beyond > noise else None


def _rounds(profile: LatencyProfile, step: Span) -> tuple[int, int]:
    """Measurements behind the two ends of a step."""
    return profile.rounds[profile.tokens.index(step.above)], profile.rounds[profile.tokens.index(step.below)]


def unsure(profile: LatencyProfile) -> list[int]:
    """Counts that more rounds are to be spent on: those that are not precise, and the ends of undecided steps."""
    found = {count for count in profile.tokens if profile.error(count) > _PRECISION * profile.dense_ms}
    cliffs = profile.cliffs()
    for step in profile.steps():
        if step in cliffs and min(_rounds(profile, step)) < _DECIDED:
            undecided = True  # a verdict that a few lucky rounds may have made
        elif step.above - step.below > 1:
            undecided = hides(profile, step) is None
        else:  # is it a cliff?
            sure = profile.surely * profile.noise(step)
            undecided = sure > 0.3 * _SOUGHT * profile.dense_ms and abs(profile.excess(step) - sure) < sure
        if undecided:
            found |= {step.above, step.below}
    return sorted(c for c in found if profile.rounds[profile.tokens.index(c)] < _ENOUGH)


def around(tokens: Sequence[int], count: int) -> list[int]:
    """The measured neighbours of a count that is not measured yet."""
    place = int(np.searchsorted(tokens, count))
    return list(tokens[max(place - 1, 0) : place + 1])
