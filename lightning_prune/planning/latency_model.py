"""Predicted latency of any schedule, from one latency curve and the overhead of each reducing block."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prune.planning.objectives import RATIO_TOLERANCE
from lightning_prune.profiling import LatencyProfile, LatencyStats
from lightning_prune.schedule import Schedule

Levels = NDArray[np.int64]


@dataclass(frozen=True)
class LatencyModelTuning:
    """Constants of the latency model.

    Attributes:
        max_levels: Token counts that are searched: the time of the search grows with their square.
        max_needed: How many of the counts that a method needs are among them, at even distances, with the smallest.
    """

    max_levels: int = 40
    max_needed: int = 16


TUNING = LatencyModelTuning()


class ReductionOverhead(NamedTuple):
    """Latency that a method adds to that of the tokens, in milliseconds per batch.

    Attributes:
        per_block: Of each reducing block, whatever the number of tokens: small operations take as long for few.
        per_tokens: Of a reducing block that N tokens enter, in addition; proportionally less for fewer.
        per_later_block: Of each block after the first that reduces: attention adds the sizes of merged tokens.
    """

    per_block: float = 0.0
    per_tokens: float = 0.0
    per_later_block: float = 0.0


NO_OVERHEAD = ReductionOverhead()


@dataclass(frozen=True)
class LatencyModel:
    """Latency of a schedule; all blocks are alike, so that a block costs the same at a token count wherever it is.

    latency(schedule) = dense + sum over the blocks of their change against N tokens + overhead. A reducing block runs
    its attention on the tokens that enter and its MLP on those that are left.

    Attributes:
        levels: (levels,) token counts, ascending; the last is N.
        block_ms: (levels,) latency of a block minus that at N tokens; negative where it is faster.
        dense_ms: Latency of the dense model.
        depth: Number of blocks.
        attention_share: Share of a block's latency before its reduction.
        overhead: Of the method.
        tail_share: Share of a block's latency that the exact tail saves in the last block of whatever removes tokens:
            it runs as if the smallest count were left. 0 without a tail.

    Example:
        >>> import numpy as np
        >>> from lightning_prune import Schedule
        >>> from lightning_prune.planning.latency_model import LatencyModel
        >>> levels, block_ms = np.array([100, 200]), np.array([-1.0, 0.0])
        >>> model = LatencyModel(levels, block_ms, dense_ms=10.0, depth=4, attention_share=0.25)
        >>> model.predict(Schedule([0, 0, 100, 0]))
        8.25
    """

    levels: Levels
    block_ms: NDArray[np.float64]
    dense_ms: float
    depth: int
    attention_share: float
    overhead: ReductionOverhead = NO_OVERHEAD
    tail_share: float = 0.0

    @classmethod
    def from_profile(
        cls,
        profile: LatencyProfile,
        attention_share: float,
        levels: Sequence[int] | None = None,
        overhead: ReductionOverhead = NO_OVERHEAD,
    ) -> "LatencyModel":
        """From a latency curve, measured with all tokens removed before block 0 or in one block.

        Args:
            profile: The curve.
            attention_share: Share of a block's latency before its reduction.
            levels: Counts to keep, also ones between those of the curve; all of the curve if None.
            overhead: Of the method that is planned for.
        """
        tokens = np.array(profile.tokens if levels is None else sorted({*levels, profile.dense_tokens}))
        milliseconds = np.interp(tokens, profile.tokens, profile.milliseconds)
        # Blocks that run on the count: all, or those after the reducing block and its MLP.
        blocks = profile.depth if removes_before_blocks(profile) else profile.depth - profile.block - attention_share
        saved = (milliseconds - profile.dense_ms) / blocks
        return cls(tokens, saved, profile.dense_ms, profile.depth, attention_share, overhead)

    def change_ms(self, tokens: float) -> float:
        """Latency of a block minus that at N tokens, at any count; linear between the levels."""
        return float(np.interp(tokens, self.levels, self.block_ms))

    def predict(self, schedule: Schedule) -> float:
        """Milliseconds of a schedule.

        Args:
            schedule: Tokens that each block removes.
        """
        n = entering = int(self.levels[-1])
        total = self.dense_ms + self.tail_ms(schedule)
        for block, leaving in enumerate(schedule.tokens(n)):
            total += self.attention_share * self.change_ms(entering)
            total += (1 - self.attention_share) * self.change_ms(leaving)
            if leaving < entering and not self.is_in_tail(block):
                total += self.overhead.per_block + self.overhead.per_tokens * entering / n
            if entering < n:
                total += self.overhead.per_later_block
            entering = leaving
        return total

    def tail_ms(self, schedule: Schedule) -> float:
        """What the exact tail changes of the latency of a schedule, in milliseconds; 0 where nothing is removed."""
        if not schedule.total_removed:
            return 0.0
        return self.tail_share * float(self.block_ms[0] - self.change_ms(schedule.tokens(int(self.levels[-1]))[-1]))

    def is_in_tail(self, block: int) -> bool:
        """Whether the exact tail takes the place of what this block removes."""
        return bool(self.tail_share) and block == self.depth - 1

    def steps(self, block: int = 0) -> NDArray[np.float64]:
        """(levels, levels) what a block adds to dense if a count enters (rows) and a count leaves (columns).

        inf where more tokens would leave than enter. Where the exact tail takes the place of what the last block
        removes, this can remove only what makes the whole schedule: the tail alone.

        Args:
            block: Index of the block.
        """
        entering, leaving = self.block_ms[:, None], self.block_ms[None, :]
        added = self.attention_share * entering + (1 - self.attention_share) * leaving
        places = np.arange(len(self.levels))
        share = self.levels[:, None] / self.levels[-1]
        reduces = places[None, :] < places[:, None]
        if self.is_in_tail(block):
            is_dense = (places[:, None] == len(places) - 1) & ~reduces
            added = added + np.where(is_dense, 0.0, self.tail_share * (self.block_ms[0] - leaving))
            added = np.where(reduces & (places[:, None] < len(places) - 1), np.inf, added)
        else:
            added = added + (self.overhead.per_block + self.overhead.per_tokens * share) * reduces
        added = added + self.overhead.per_later_block * (places[:, None] < len(places) - 1)
        return np.where(places[None, :] <= places[:, None], added, np.inf)


def removes_before_blocks(profile: LatencyProfile) -> bool:
    """Whether a curve was measured with all tokens removed before block 0, so that every block runs on the count."""
    settings = profile.context.get("method_settings")
    if profile.protocol == "paper":
        return True
    if settings and "site" in settings:
        return settings["site"] == repr("input")
    return profile.method == "random" and profile.block == 0


def token_levels(profile: LatencyProfile, needed: Iterable[int] = ()) -> list[int]:
    """The token counts that are searched, ascending, N last: those of a curve.

    Of more than 40 counts, the lower edges of the cliffs and an even selection of the others. If the device gains
    nothing, N alone.

    Args:
        profile: The latency curve.
        needed: Counts that a method can leave where it can leave few, such as those of the grids of `resize`. They are
            searched, too: hardly any of them is one that the curve was measured at, and between those it is linear.

    Example:
        >>> from lightning_prune import LatencyProfile
        >>> from lightning_prune.planning.latency_model import token_levels
        >>> curve = LatencyProfile((96, 160, 197), (5.0, 8.0, 10.0), (0.01,) * 3, (9,) * 3, "random", 0, 12)
        >>> token_levels(curve), token_levels(curve, [65, 145, 170])
        ([96, 160, 197], [96, 145, 160, 170, 197])
    """
    if not any(profile.is_faster_than_dense(count) for count in profile.tokens):
        return [profile.dense_tokens]
    measured = profile.tokens
    between = sorted({count for count in needed if measured[0] < count < measured[-1]} - {*measured})
    places = np.linspace(0, len(between) - 1, min(len(between), TUNING.max_needed)).round().astype(int)
    between = [between[place] for place in places]
    if len(measured) + len(between) <= TUNING.max_levels:
        return sorted([*measured, *between])
    cliffs = sorted(profile.cliffs(), key=profile.step_excess, reverse=True)[: TUNING.max_levels // 2]
    edges = {profile.tokens[0], profile.dense_tokens, *(cliff.below for cliff in cliffs)}
    others = [count for count in measured if count not in edges]
    kept = max(min(TUNING.max_levels - len(edges) - len(between), len(others)), 0)
    places = np.linspace(0, len(others) - 1, kept).round().astype(int)
    return sorted(edges | {others[place] for place in places} | {*between})


def budget_tolerance(timing: LatencyStats, largest: float) -> float:
    """The share by which a timing may miss a budget: two standard errors, between 0.5% and `largest`."""
    return min(max(2 * timing.ratio_stderr, RATIO_TOLERANCE), largest)
