"""Successive halving of methods: what is surely worse than another after a few images is measured no further."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prune.planning.dynamic_program import Solution, optimal_schedules
from lightning_prune.planning.mixed_latency import MixedLatency
from lightning_prune.planning.objectives import RATIO_TOLERANCE, LatencyBudget, Objective
from lightning_prune.planning.sensitivity import Table
from lightning_prune.profiling.latency_profile import SAVING


@dataclass(frozen=True)
class HalvingTuning:
    """Constants of the halving.

    Attributes:
        first_images: Images after which methods are compared for the first time; then whenever there are twice as many.
        min_groups: Groups of images below which a standard error says too little.
        sigmas: Standard errors by which a method must cost more; more of them where groups are few.
        min_cost_nats: A smaller cost is no reason to leave a method out: hardly an image changes its class.
        margin_ratio: Share of a latency budget by which the predicted latencies may be wrong: a method must be worse
            below and above it, too.
        grid: Parts of the dense latency that the dynamic programme distinguishes, as this one only compares.
    """

    first_images: int = 16
    min_groups: int = 4
    sigmas: float = 2.0
    min_cost_nats: float = 1e-4
    margin_ratio: float = 0.05
    grid: int = 400


TUNING = HalvingTuning()


class MeasuredMethod(NamedTuple):
    """What a few images say of a method.

    Attributes:
        latency: Of its schedules, with its overhead.
        costs: (depth, levels, levels) cost of accuracy of each step, as `Sensitivity.costs` returns it.
        without: The same without each group of images in turn; of the same groups for all methods.
    """

    latency: MixedLatency
    costs: Table
    without: Sequence[Table]


class _Choice(NamedTuple):
    """The cheapest schedule within a latency.

    Attributes:
        cost: By all images.
        without: (groups,) cost without each group of images.
        methods: Labels of the methods that it uses.
    """

    cost: float
    without: NDArray[np.float64]
    methods: frozenset[str]


def next_look(images: int) -> int:
    """The number of images after which methods are compared again.

    Args:
        images: Number of them so far.

    Example:
        >>> from lightning_prune.planning.halving import next_look
        >>> [next_look(images) for images in (0, 16, 40, 64)]
        [16, 32, 64, 128]
    """
    look = TUNING.first_images
    while look <= images:
        look *= 2
    return look


def dominated_methods(
    measured: Mapping[str, MeasuredMethod], levels: Sequence[int], objectives: Sequence[Objective]
) -> dict[str, tuple[str, ...]]:
    """The methods that are surely worse than others wherever an objective may choose a schedule.

    Methods are compared at equal predicted latency, overhead included, by the costs of their best schedules. The
    standard error of the difference is that of the delete-a-group jackknife over the same images. A method stays if a
    schedule of several methods that uses it is surely cheaper than all schedules of a single one.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 11, of the jackknife.

    Args:
        measured: Label -> what is known of the method.
        levels: Token counts, ascending, N last.
        objectives: What will be planned for.

    Returns:
        Label of a method that is worse -> the labels of those that are better, each somewhere.
    """
    groups = min((len(method.without) for method in measured.values()), default=0)
    if len(measured) < 2 or groups < TUNING.min_groups or not objectives:
        return {}
    fronts = {label: _Front({label: method}, levels) for label, method in measured.items()}
    better_at = {
        label: [_better(label, fronts, ratio) for ratio in _ratios(fronts[label], objectives)] for label in measured
    }
    worse: dict[str, tuple[str, ...]] = {}
    for label, found in better_at.items():
        decided = [better for better in found if better is not None]
        if decided and all(decided):
            worse[label] = tuple(dict.fromkeys(decided))
    if not worse or len(worse) == len(measured):
        return {}
    mixed = _Front(measured, levels)
    for ratio in sorted({r for label in worse for r in _ratios(fronts[label], objectives)}):
        choice = mixed.cheapest(ratio)
        singles = [c for front in fronts.values() if (c := front.cheapest(ratio)) is not None]
        if choice is None or not singles or not choice.methods & worse.keys():
            continue
        if _is_surely_cheaper(choice, min(singles, key=lambda single: single.cost)):
            worse = {label: better for label, better in worse.items() if label not in choice.methods}
    return worse


class _Front:
    """The Pareto front of one or several methods, by predicted latency and cost."""

    def __init__(self, measured: Mapping[str, MeasuredMethod], levels: Sequence[int]) -> None:
        self._labels, self._measured = list(measured), list(measured.values())
        self._places = {level: place for place, level in enumerate(levels)}
        models = tuple(model for method in self._measured for model in method.latency.models)
        weighs = tuple(each for method in self._measured for each in method.latency.weighs)
        self._latency = MixedLatency(models, weighs)
        costs = np.stack([method.costs for method in self._measured], axis=1)
        self._dense_ms = self._latency.dense_ms
        self._solutions = optimal_schedules(levels, self._latency.steps(), costs, self._dense_ms, weighs, TUNING.grid)[
            1:
        ]  # without dense
        self._known: dict[Solution, _Choice] = {}

    @property
    def ratios(self) -> list[float]:
        """Latencies over dense of those that are faster than dense by enough to be worth anything."""
        ratios = [solution.milliseconds / self._dense_ms for solution in self._solutions]
        return [ratio for ratio in ratios if ratio < 1 - SAVING]

    def cheapest(self, ratio: float) -> _Choice | None:
        """The cheapest schedule that takes at most a share of the dense latency; None if there is none."""
        within = [s for s in self._solutions if s.milliseconds <= (ratio + RATIO_TOLERANCE) * self._dense_ms]
        if not within:
            return None
        best = min(within, key=lambda solution: solution.cost)
        if best not in self._known:
            self._known[best] = self._choice(best)
        return self._known[best]

    def _choice(self, solution: Solution) -> _Choice:
        count = len(self._measured[0].without)
        cost, without, used = 0.0, np.zeros(count), set()
        entering = len(self._places) - 1
        for block, (level, method) in enumerate(zip(solution.levels, solution.methods, strict=True)):
            leaving = self._places[level]
            if method is not None:
                step, own = (block, entering, leaving), self._measured[method]
                cost += float(own.costs[step])
                without += np.array([table[step] for table in own.without[:count]])
                used.add(self._labels[method])
            entering = leaving
        return _Choice(cost, without, frozenset(used))


def _ratios(front: _Front, objectives: Sequence[Objective]) -> list[float]:
    """The latencies over dense at which an objective may choose a schedule of a front."""
    found: list[float] = []
    for objective in objectives:
        if isinstance(objective, LatencyBudget):
            dense_ms = front._dense_ms
            wanted = min(objective.limit_ms(dense_ms) / dense_ms, 1 - SAVING)
            found += [wanted * (1 + share) for share in (-TUNING.margin_ratio, 0.0, TUNING.margin_ratio)]
        else:
            found += front.ratios
    return sorted(set(found))


def _better(label: str, fronts: Mapping[str, _Front], ratio: float) -> str | None:
    """The method that is surely better at a latency; empty if none is, None where that cannot be asked."""
    own = fronts[label].cheapest(ratio)
    others = [(choice.cost, name, choice) for name in fronts if (choice := fronts[name].cheapest(ratio)) is not None]
    if not others or (own is not None and own.cost < TUNING.min_cost_nats):
        return None
    _, name, best = min(others, key=lambda other: other[:2])
    return name if own is None or (name != label and _is_surely_cheaper(best, own)) else ""


def _is_surely_cheaper(one: _Choice, other: _Choice) -> bool:
    """Whether one schedule costs less than another by enough standard errors of the difference."""
    groups = len(one.without)
    differences = other.without - one.without
    stderr = sqrt((groups - 1) / groups * float(np.square(differences - differences.mean()).sum()))
    sigmas = TUNING.sigmas * (1 + 2 / (groups - 1))  # of few groups the standard error itself is not known well
    return other.cost - one.cost > sigmas * stderr
