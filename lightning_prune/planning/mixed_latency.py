"""Predicted latency of schedules whose blocks reduce by different methods, and the overheads that explain timings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prune.planning.latency_model import NO_OVERHEAD, LatencyModel, ReductionOverhead
from lightning_prune.profiling import LatencyStats
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class OverheadTuning:
    """Constants of the fit of overheads.

    Attributes:
        min_error_ratio: Error of the model itself, over dense, however well a schedule was timed.
        one_round_error_ratio: Error of a timing of one round, over dense: a few rounds may agree by chance.
    """

    min_error_ratio: float = 0.003
    one_round_error_ratio: float = 0.03


TUNING = OverheadTuning()
MethodOf = Sequence[int | None]
"""Of each block, the index of the method by which it reduces; what it says of other blocks is not read."""


class TimedSchedule(NamedTuple):
    """A schedule of one or more methods with its timing.

    Attributes:
        schedule: Tokens that each block removes.
        methods: Of each block, the index of its method.
        timing: Its latency; what counts is the ratio to dense.
    """

    schedule: Schedule
    methods: MethodOf
    timing: LatencyStats


@dataclass(frozen=True)
class MixedLatency:
    """Latency of schedules in which each block reduces by its own method.

    What a method adds to its reducing blocks is its own. What it adds to later blocks depends on what they have to do:
    after the first method whose sizes weight the attention, every block does that, whatever the other methods are.

    Attributes:
        models: Of each method; they differ in overhead and in the share of a block before the reduction.
        weighs: Of each method, whether its sizes weight the attention of later blocks.

    Example:
        >>> import numpy as np
        >>> from lightning_prune import Schedule
        >>> from lightning_prune.planning.latency_model import LatencyModel, ReductionOverhead
        >>> from lightning_prune.planning.mixed_latency import MixedLatency
        >>> def model(overhead):
        ...     return LatencyModel(np.array([50, 100, 200]), np.array([-1.5, -1.0, 0.0]), 10.0, 4, 0.25, overhead)
        >>> mixed = MixedLatency((model(ReductionOverhead(0.1)), model(ReductionOverhead(0.4, 0, 0.2))), (False, True))
        >>> mixed.predict(Schedule([100, 50, 0, 0]), (0, 1, None, None))  # the sizes of block 1 slow blocks 2 and 3
        5.775
    """

    models: tuple[LatencyModel, ...]
    weighs: tuple[bool, ...]

    @property
    def dense_ms(self) -> float:
        """Latency of the dense model."""
        return self.models[0].dense_ms

    @property
    def later_ms(self) -> tuple[float, ...]:
        """What is added to each block that fewer than N tokens enter, in each state: as it is, then with weights.

        A single value where all methods weight, or none does.
        """
        states = sorted(set(self.weighs))
        return tuple(max(m.overhead.per_later_block for m, own in self._pairs if own == state) for state in states)

    @property
    def _pairs(self) -> list[tuple[LatencyModel, bool]]:
        return list(zip(self.models, self.weighs, strict=True))

    def steps(self) -> NDArray[np.float64]:
        """(states, depth, methods, levels, levels) what a block adds to dense, as `optimal_schedules` takes it.

        Where all blocks are alike, of one block.
        """
        plain = [replace(model, overhead=model.overhead._replace(per_later_block=0.0)) for model in self.models]
        depth = self.models[0].depth if self.models[0].tail_share else 1
        # Only the last block may differ from the others.
        first, last = (np.stack([model.steps(block) for model in plain]) for block in (0, depth - 1))
        own = np.stack([*[first] * (depth - 1), last])
        is_later = self.models[0].levels[:, None] < self.models[0].levels[-1]
        return np.stack([own + later * is_later for later in self.later_ms])

    def predict(self, schedule: Schedule, methods: MethodOf) -> float:
        """Milliseconds of a schedule.

        Args:
            schedule: Tokens that each block removes.
            methods: Of each block, the index of its method.
        """
        model, later_ms = self.models[0], self.later_ms
        n = entering = int(model.levels[-1])
        total, state = self.dense_ms + model.tail_ms(schedule), 0
        for block, (leaving, method) in enumerate(zip(schedule.tokens(n), methods, strict=True)):
            own = self.models[method] if leaving < entering and method is not None else model
            total += own.attention_share * model.change_ms(entering)
            total += (1 - own.attention_share) * model.change_ms(leaving)
            if entering < n:
                total += later_ms[state]
            if leaving < entering and method is not None and not model.is_in_tail(block):
                total += own.overhead.per_block + own.overhead.per_tokens * entering / n
                state = max(state, int(self.weighs[method])) if len(later_ms) > 1 else 0
            entering = leaving
        return total

    def without_overhead(self) -> "MixedLatency":
        """The latency of the tokens alone."""
        return replace(self, models=tuple(replace(model, overhead=NO_OVERHEAD) for model in self.models))


def fit_overheads(latency: MixedLatency, timed: Iterable[TimedSchedule]) -> MixedLatency:
    """The overheads, no part below 0, that explain best how much slower schedules are than their tokens alone.

    Non-negative least squares over all schedules of all methods; more exact timings weigh more.

    Args:
        latency: Of the tokens; its own overheads are not used.
        timed: Schedules with timings.
    """
    from scipy.optimize import nnls  # slow to import

    alone, states = latency.without_overhead(), len(latency.later_ms)
    rows: list[NDArray[np.float64]] = []
    missing_ms: list[float] = []
    for each in timed:
        if not each.schedule.total_removed:
            continue
        timing = each.timing
        error = max(timing.ratio_stderr, TUNING.min_error_ratio, TUNING.one_round_error_ratio / sqrt(timing.rounds))
        rows.append(_occurrences(alone, each, states) / error)
        missing_ms.append((timing.ratio * latency.dense_ms - alone.predict(each.schedule, each.methods)) / error)
    if not rows:
        return alone
    found, _ = nnls(np.array(rows), np.array(missing_ms))
    count = len(latency.models)
    later = found[2 * count :]
    models = []
    for index, (model, weighs) in enumerate(alone._pairs):
        per_later_block = float(later[int(weighs) if states > 1 else 0])
        overhead = ReductionOverhead(float(found[index]), float(found[count + index]), per_later_block)
        models.append(replace(model, overhead=overhead))
    return replace(latency, models=tuple(models))


def fit_overhead(model: LatencyModel, timed: Iterable[tuple[Schedule, LatencyStats]]) -> ReductionOverhead:
    """The overhead of one method; see `fit_overheads`.

    Args:
        model: Of the tokens alone.
        timed: Schedules with timings; what counts is their ratio to dense.
    """
    schedules = [TimedSchedule(schedule, [0] * model.depth, timing) for schedule, timing in timed]
    return fit_overheads(MixedLatency((model,), (False,)), schedules).models[0].overhead


def _occurrences(latency: MixedLatency, timed: TimedSchedule, states: int) -> NDArray[np.float64]:
    """How often a schedule has each part of the overheads.

    Reducing blocks of each method, the same weighted by the share of N that enters, and later blocks in each state.
    """
    count, n = len(latency.models), int(latency.models[0].levels[-1])
    found = np.zeros(2 * count + states)
    entering, state = n, 0
    for block, (leaving, method) in enumerate(zip(timed.schedule.tokens(n), timed.methods, strict=True)):
        if entering < n:
            found[2 * count + state] += 1
        if leaving < entering and method is not None and not latency.models[0].is_in_tail(block):
            found[method] += 1
            found[count + method] += entering / n
            state = max(state, int(latency.weighs[method])) if states > 1 else 0
        entering = leaving
    return found
