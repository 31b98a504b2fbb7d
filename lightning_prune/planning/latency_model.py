"""Latency of a schedule, predicted from a latency profile and the overhead of each reducing block."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prune.planning.speedup_targets import ratio_stderr
from lightning_prune.profiling import LatencyProfile, LatencyStats
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

Levels = NDArray[np.int64]


class ReductionOverhead(NamedTuple):
    """What a method costs besides the tokens, in milliseconds of a batch.

    Attributes:
        reducing: Of each block that reduces, however many tokens enter it: small operations take as long for few.
        tokens: Of a block that reduces N tokens, on top; of fewer in proportion.
        after: Of each block after the first that reduces: merged tokens that attention must weigh by their sizes.
    """

    reducing: float = 0.0
    tokens: float = 0.0
    after: float = 0.0


FREE = ReductionOverhead()


@dataclass(frozen=True)
class LatencyModel:
    """Blocks are alike, so what one costs at a token count is the same wherever it stands.

    latency(schedule) = dense - sum over blocks of what each saves + prices. A block that reduces runs its attention on
    the tokens that enter and its MLP on those that are left.

    Attributes:
        levels: (levels,) token counts of the curve, ascending; the last is N.
        block_ms: (levels,) what a block costs less than at N, as a number <= 0 where it is faster.
        dense_ms: Latency of the unpruned model.
        depth: Blocks.
        attention: Share of a block's time that lies before its reduction.
        price: Of the method.

    Example:
        >>> import numpy as np
        >>> from lightning_prune import Schedule
        >>> from lightning_prune.planning.latency_model import LatencyModel
        >>> model = LatencyModel(np.array([100, 200]), np.array([-1.0, 0.0]), dense_ms=10.0, depth=4, attention=0.25)
        >>> model.predict(Schedule([0, 0, 100, 0]))
        8.25
    """

    levels: Levels
    block_ms: NDArray[np.float64]
    dense_ms: float
    depth: int
    attention: float
    price: ReductionOverhead = FREE

    @classmethod
    def from_profile(
        cls,
        profile: LatencyProfile,
        attention: float,
        levels: Sequence[int] | None = None,
        price: ReductionOverhead = FREE,
    ) -> "LatencyModel":
        """From a curve on which all tokens go before block 0, so that every block runs on the count.

        Args:
            profile: Of such a reduction, as `RandomDrop(site="input")`.
            attention: Share of a block's time that lies before its reduction.
            levels: Counts to keep; all if None.
            price: Of the method that is planned for.
        """
        tokens = np.array(profile.tokens if levels is None else sorted({*levels, profile.dense_tokens}))
        milliseconds = np.array([profile.latency_ms(int(count)) for count in tokens])
        return cls(
            tokens, (milliseconds - profile.dense_ms) / profile.depth, profile.dense_ms, profile.depth, attention, price
        )

    def at(self, tokens: float) -> float:
        """What a block costs less than at N, at any count; straight between the levels."""
        return float(np.interp(tokens, self.levels, self.block_ms))

    def predict(self, schedule: Schedule) -> float:
        """Milliseconds of a schedule.

        Args:
            schedule: One number a block.
        """
        n = entering = int(self.levels[-1])
        total = self.dense_ms
        for leaving in schedule.tokens(n):
            total += self.attention * self.at(entering) + (1 - self.attention) * self.at(leaving)
            total += (self.price.reducing + self.price.tokens * entering / n) * (leaving < entering)
            total += self.price.after * (entering < n)
            entering = leaving
        return total

    def steps(self) -> NDArray[np.float64]:
        """(levels, levels) what a block adds to dense if so many tokens enter and so many leave; inf if more leave."""
        entering, leaving = self.block_ms[:, None], self.block_ms[None, :]
        added = self.attention * entering + (1 - self.attention) * leaving
        places = np.arange(len(self.levels))
        share = self.levels[:, None] / self.levels[-1]
        added = added + (self.price.reducing + self.price.tokens * share) * (places[None, :] < places[:, None])
        added = added + self.price.after * (places[:, None] < len(places) - 1)
        return np.where(places[None, :] <= places[:, None], added, np.inf)


_SUREST = 0.003  # of dense: the model is no better than that, however well a schedule was timed
_ONE_ROUND = 0.03  # of dense: few rounds may agree by chance, and one has no spread at all


def probe_schedules(
    reduction: Reduction, tokens: int, prefix_tokens: int, depth: int, first: int
) -> dict[str, Schedule]:
    """Schedules that tell the prices apart: one block early, one late, four, and three of which two find few tokens.

    Args:
        reduction: The method.
        tokens: N.
        prefix_tokens: P.
        depth: Blocks.
        first: The first block that can reduce.
    """
    middle = (first + depth) // 2
    wanted: dict[str, list[tuple[int, int]]] = {  # block, tokens that it is to remove
        "early": [(first, tokens // 2)],
        "late": [(max(depth - 2, first), tokens // 3)],
        "four": [(block, tokens // 12) for block in np.linspace(first, depth - 1, 4).astype(int).tolist()],
        "few": [(first, tokens * 2 // 3), (middle, tokens // 12), (depth - 1, tokens // 12)],
    }
    found: dict[str, Schedule] = {}
    for name, cuts in wanted.items():
        removed, left = [0] * depth, tokens
        for block, cut in dict(cuts).items():
            removed[block] = min(max(cut, 1), reduction.max_removed(left, prefix_tokens))
            left -= removed[block]
        found[name] = Schedule(removed)
    return found


def fit_overhead(model: LatencyModel, timed: Iterable[tuple[Schedule, LatencyStats]]) -> ReductionOverhead:
    """The prices, none below 0, that explain best by how much schedules are slower than their tokens alone would be.

    Args:
        model: Of the tokens alone.
        timed: Schedules with their timings, of which the ratio to dense counts; the surer ones weigh more.
    """
    from sklearn.linear_model import LinearRegression  # takes a second to import

    rows: list[Sequence[float]] = []
    lacking: list[float] = []
    weights: list[float] = []
    n = int(model.levels[-1])
    for schedule, timing in timed:
        reducing = schedule.reducing
        if not reducing:
            continue
        entering = (n, *schedule.tokens(n))
        share = sum(entering[block] for block in reducing) / n
        rows.append((len(reducing), share, model.depth - 1 - min(reducing)))
        lacking.append(timing.ratio * model.dense_ms - model.predict(schedule))
        weights.append(1 / max(ratio_stderr(timing), _SUREST, _ONE_ROUND / sqrt(timing.rounds)) ** 2)
    if not rows:
        return ReductionOverhead()
    fitted = LinearRegression(fit_intercept=False, positive=True).fit(rows, lacking, sample_weight=weights)
    return ReductionOverhead(*map(float, fitted.coef_))
