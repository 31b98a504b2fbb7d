"""Choosing how many tokens each of several blocks removes, for each method."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune._utils.progress import progress_bar
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.planning.dynamic_program import FrontPoint, pareto_front
from lightning_prune.planning.latency_model import LatencyModel, fit_overhead, probe_schedules
from lightning_prune.planning.objectives import Objective
from lightning_prune.planning.results import FrontEntry
from lightning_prune.planning.sensitivity import Sensitivity, Table
from lightning_prune.planning.single_block import missed_by_dense, spread
from lightning_prune.profiling import LatencyProfile, LatencyStats, Proxy, Workload, compare_latency
from lightning_prune.profiling.latency_profile import SAVING
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.simulation import attention_share
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule


def method_labels(reductions: Sequence[Reduction]) -> dict[Reduction, str]:
    """One label each: the name, and where several have it the settings that they differ in.

    Args:
        reductions: In any order.

    Raises:
        ArgumentError: If two are the same.

    Example:
        >>> from lightning_prune.planning.multi_block import method_labels
        >>> from lightning_prune.reduction import RandomDrop, TopK
        >>> list(method_labels([TopK(), RandomDrop(), RandomDrop(seed=3)]).values())
        ['topk', 'random (seed=0)', 'random (seed=3)']
    """
    found: dict[Reduction, str] = {}
    for reduction in reductions:
        if reduction in found:
            raise ArgumentError(f"`methods` must differ from one another, got {reduction!r} twice.")
        namesakes = [other.settings() for other in reductions if other.name == reduction.name]
        own = reduction.settings()
        differing = [key for key in own if any(other.get(key) != own[key] for other in namesakes)]
        told = ", ".join(f"{key}={own[key]!r}" for key in differing)
        found[reduction] = f"{reduction.name} ({told})" if told else reduction.name
        taken = sum(label.split(" #")[0] == found[reduction] for label in found.values())
        if taken > 1:  # they differ in what they do not say
            found[reduction] += f" #{taken}"
    return found


_MOST_LEVELS = 40  # the time of the search grows with the square


def search_levels(curve: LatencyProfile) -> list[int]:
    """The counts of a curve, ascending, N last; of more than forty the lower edges of cliffs and a spread of others.

    Where the device gains nothing, N alone.

    Args:
        curve: All tokens go before block 0.
    """
    if not any(curve.is_faster_than_dense(count) for count in curve.tokens):
        return [curve.dense_tokens]
    if len(curve.tokens) <= _MOST_LEVELS:
        return list(curve.tokens)
    cliffs = sorted(curve.cliffs(), key=curve.step_excess, reverse=True)[: _MOST_LEVELS // 2]
    edges = {curve.tokens[0], curve.dense_tokens, *(cliff.below for cliff in cliffs)}
    others = [count for count in curve.tokens if count not in edges]
    places = np.linspace(0, len(others) - 1, min(_MOST_LEVELS - len(edges), len(others))).round().astype(int)
    return sorted(edges | {others[place] for place in places})


_APART = 0.005  # of dense: schedules that are closer in latency are one choice


def entries_of(
    label: str, points: Sequence[FrontPoint], tokens: int, predicted: Sequence[float], timed: Sequence[float]
) -> list[FrontEntry]:
    """The schedules of a front, corrected by those that were timed: each takes so much longer as those beside it did.

    Between two that were timed, or one and dense, it is in proportion.

    Args:
        label: Of the method.
        points: As `pareto_front` gives them, dense first.
        tokens: N.
        predicted: Milliseconds of some schedules, as predicted.
        timed: Milliseconds of the same, as timed.

    Returns:
        From dense to the fastest, none as slow or as costly as another that is better in both.
    """
    dense_ms = points[0].milliseconds
    known = sorted([*zip(predicted, timed, strict=True), (dense_ms, dense_ms)])
    at = np.array([before for before, _ in known])
    longer = np.array([after for _, after in known]) / np.maximum(at, 1e-9)
    found = []
    for point in points:
        entering = (tokens, *point.levels[:-1])
        schedule = Schedule([before - after for before, after in zip(entering, point.levels, strict=True)])
        correction = float(np.interp(point.milliseconds, at, longer))
        found.append(FrontEntry(label, schedule, point.milliseconds * correction, point.cost))
    return undominated(found)


def undominated(entries: Sequence[FrontEntry]) -> list[FrontEntry]:
    """The first, dense, and of the others those that are faster than all that cost no more."""
    found = [entries[0]]
    for entry in sorted(entries[1:], key=lambda entry: (entry.cost, entry.milliseconds)):
        if entry.milliseconds < found[-1].milliseconds:
            found.append(entry)
    return found


def numbered(entries: Sequence[FrontEntry]) -> list[FrontEntry]:
    """A few of a front, from the fastest to dense: of those within half a percent of dense the one that costs least.

    Args:
        entries: From dense to the fastest; the fastest is among the few in any case.
    """
    dense = entries[0]
    bins = {
        int((dense.milliseconds - e.milliseconds) / (_APART * dense.milliseconds)): e for e in reversed(entries[1:])
    }
    chosen = {entry.schedule.removed: entry for entry in (entries[-1], *bins.values(), dense)}
    return list(chosen.values())


_MOST_PROXIES = 8  # schedules whose proxy is measured for one choice, after the first few
_FIRST_PROXIES = 4

Removed = tuple[int, ...]


class MethodFront:
    """Schedules of one method by predicted latency, and the proxy of those that were asked for.

    The latency model learns: each schedule that is timed makes the prices of the method surer, and those beside it on
    the front are predicted by how much longer, or shorter, it took than these prices say.

    Args:
        reduction: The method.
        label: What to call it among others.
        latency: Of the tokens alone.
        costs: (depth, levels, levels) cost of accuracy, as `pareto_front` takes them.
        measure: The proxy of a schedule, relative to dense.
        name: What the proxy means.
        probed: Any schedules with their timings, for the prices.

    Attributes:
        entries: A few of the front, from the fastest to dense: of those about as fast the one that costs least.
        values: What a schedule removes -> its proxy, where it was measured.
    """

    def __init__(
        self,
        reduction: Reduction,
        label: str,
        latency: LatencyModel,
        costs: Table,
        measure: Callable[[Reduction, Schedule], float],
        name: str,
        probed: Iterable[tuple[Schedule, LatencyStats]] = (),
    ) -> None:
        self.reduction, self.label, self.name = reduction, label, name
        self._plain, self._costs, self._measure = latency, costs, measure
        self._probed = list(probed)
        self._timed: dict[Removed, tuple[FrontEntry, LatencyStats]] = {}
        self.values: dict[Removed, float] = {}
        self._known: dict[float, float] = {0.0: 1.0}  # cost -> proxy
        self._all: list[FrontEntry] = []
        self._fit()

    @property
    def dense(self) -> FrontEntry:
        """The schedule that removes nothing."""
        return self._all[0]

    @property
    def tokens(self) -> int:
        """N."""
        return int(self._plain.levels[-1])

    def ratio(self, entry: FrontEntry) -> float:
        """Predicted latency over dense."""
        return entry.milliseconds / self._plain.dense_ms

    def observe(self, entry: FrontEntry, timing: LatencyStats) -> None:
        """Takes the timing of a schedule of the front."""
        self._timed[entry.schedule.removed] = entry, timing
        self._fit()

    def accuracy(self, entry: FrontEntry) -> float:
        """The proxy of a schedule, measured once; 1 of dense."""
        removed = entry.schedule.removed
        if not entry.schedule.total_removed:
            return 1.0
        if removed not in self.values:
            self.values[removed] = self._known[entry.cost] = self._measure(self.reduction, entry.schedule)
        return self.values[removed]

    def estimate(self, entry: FrontEntry) -> float:
        """The proxy of a schedule; where it was not measured, straight between those that cost less and more."""
        if entry.schedule.removed in self.values:
            return self.values[entry.schedule.removed]
        costs = sorted(self._known)
        return float(np.interp(entry.cost, costs, [self._known[cost] for cost in costs]))

    def everything(self, chosen: FrontEntry | None = None) -> list[FrontEntry]:
        """The whole front from dense to the fastest, and one more schedule, with the proxies that were measured."""
        found = {entry.schedule.removed: entry for entry in ([chosen] if chosen else []) + self._all}
        ordered = sorted(found.values(), key=lambda entry: -entry.milliseconds)
        return [
            replace(
                entry, accuracy=1.0 if not entry.schedule.total_removed else self.values.get(entry.schedule.removed)
            )
            for entry in ordered
        ]

    def choose(self, objective: Objective, dense_ms: float, time_limit: float) -> tuple[FrontEntry, str]:
        """The best schedule by what is known, with its proxy measured, and why.

        Args:
            objective: What makes one better than another.
            dense_ms: Latency of the unpruned model, as of now.
            time_limit: When no further proxy is measured; the first few and one choice always are.

        Raises:
            ArgumentError: If no schedule is predicted to keep to a budget; says what the fastest is predicted to take.
        """
        everything = np.array([self.ratio(entry) for entry in self.entries])
        fastest = self.entries[0]
        if objective.unreachable(range(len(everything)), dense_ms * everything) is not None:
            raise ArgumentError(
                f"The {objective} cannot be reached: the fastest schedule is predicted to take "
                f"{dense_ms * everything[0]:.3g} ms, {1 / everything[0]:.2f}x, and leaves "
                f"{fastest.schedule.tokens(self.tokens)[-1]} tokens."
            )
        missed = missed_by_dense(dense_ms, objective)
        useful = [entry for entry in self.entries if self.ratio(entry) < 1 - SAVING]
        candidates = [*useful, self.dense]
        ratios = np.array([self.ratio(entry) for entry in candidates])
        if not useful or objective.unreachable(range(len(ratios)), dense_ms * ratios) is not None:
            return self.dense, (
                f"No schedule is predicted to be faster than dense by more than 2%; the fastest by "
                f"{100 * (1 - everything[0]):.1f}%, its own price included.{missed}"
            )
        deadline = time.perf_counter() + time_limit
        if len(self._known) == 1:
            for entry in spread(useful, _FIRST_PROXIES):
                self.accuracy(entry)
        for attempt in range(_MOST_PROXIES):
            chosen = candidates[objective.best(dense_ms * ratios, np.array([self.estimate(e) for e in candidates]))]
            known = chosen is self.dense or chosen.schedule.removed in self.values
            if known or (attempt and time.perf_counter() > deadline):
                break
            self.accuracy(chosen)
        places = [i for i, e in enumerate(candidates) if e is self.dense or e.schedule.removed in self.values]
        proxies = np.array([self.accuracy(candidates[place]) for place in places])
        chosen = candidates[places[objective.best(dense_ms * ratios[places], proxies)]]
        if chosen is self.dense:
            return (
                chosen,
                f"Dense is best by the objective ({objective}): every faster schedule costs too much.{missed}",
            )
        saved, kept = 100 * (1 - self.ratio(chosen)), 100 * self.accuracy(chosen)
        return chosen, f"Best by {objective}: {saved:.1f}% less latency, {kept:.2f}% of the dense {self.name}."

    def fastest(self) -> tuple[FrontEntry, str]:
        """The fastest schedule, with what to say of it; its proxy is measured."""
        entry = self.entries[0]
        return (
            entry,
            f"The fastest schedule of {self.label}: {100 * self.accuracy(entry):.2f}% of the dense {self.name}.",
        )

    def _fit(self) -> None:
        """Prices and front from all that was timed."""
        timed = [(entry.schedule, timing) for entry, timing in self._timed.values()]
        latency = replace(self._plain, price=fit_overhead(self._plain, [*self._probed, *timed]))
        points = pareto_front([int(level) for level in latency.levels], latency.steps(), self._costs, latency.dense_ms)
        predicted = [latency.predict(schedule) for schedule, _ in timed]
        actual = [timing.ratio * latency.dense_ms for _, timing in timed]
        self._all = entries_of(self.label, points, self.tokens, predicted, actual)
        self.entries = numbered(self._all)


_COUNTS = 8  # at which the sensitivity of a block is measured
_IMAGES = 32  # in one pass, at most
_FIRST_IMAGES = 8  # in the first pass of the sensitivity, whatever time it takes

Variants = dict[str, tuple[str | Reduction, Schedule] | None]


@dataclass
class BlockSearch:
    """One model on one device, asked about methods and schedules.

    Attributes:
        model: The module that contains the transformer, dense.
        transformer: The Vision Transformer.
        images: (images, channels, height, width) calibration images.
        batch: (B, channels, height, width) images on the device.
        curve: Latency where all tokens go before block 0.
        foreign: Whether that curve is of another device, so that nothing can be timed here.
        time_limit: Time limit of each measurement.
        target: Dotted path of the transformer in the model.
        progress: Shows bars on a terminal.
        seen: How many images the sensitivities were measured on.
        seconds: How long that took.
        dense_ms: Latency of the unpruned model when it was timed last.
    """

    model: nn.Module
    transformer: VisionTransformer
    images: Tensor
    batch: Tensor
    curve: LatencyProfile
    foreign: bool
    time_limit: float
    target: str | None
    progress: bool
    seen: int = 0
    seconds: float = 0.0
    dense_ms: float = field(init=False)

    def __post_init__(self) -> None:
        """Runs the dense model, with whose outputs all others are compared."""
        self.dense_ms = self.curve.dense_ms
        size = max(len(self.batch), _IMAGES)
        with ready_to_run(self.transformer), progress_bar("Running the dense model", None, self.progress) as tick:
            self.proxy = Proxy(self.transformer, self.images, self.batch.device, size, None, tick)

    def accuracy(self, reduction: Reduction, schedule: Schedule) -> float:
        """The proxy of a schedule, relative to dense."""
        with (
            ready_to_run(self.transformer),
            progress_bar(f"Accuracy of {reduction.name}", None, self.progress),
            PatchHandle(self.transformer, reduction, schedule),
        ):
            return self.proxy.measure()

    def compare(self, variants: Variants, time_limit: float | None = None) -> Mapping[str, LatencyStats]:
        """Timings of variants, dense among them, in one interleaved run; within a third of the limit if not said."""
        limit = max(1.0, self.time_limit / 3) if time_limit is None else time_limit
        timings = compare_latency(
            self.model, self.batch, variants, time_limit=limit, module_path=self.target, verbose=self.progress
        )
        self.dense_ms = timings["dense"].milliseconds
        return timings

    def fronts(self, reductions: Sequence[Reduction]) -> list[MethodFront]:
        """The front of every method: all schedules that none of its own beats; where the device gains nothing, dense.

        Raises:
            ArgumentError: If two methods are the same.
        """
        labels = method_labels(reductions)
        prefix, depth = self.transformer.prefix_tokens, self.transformer.depth
        share = attention_share(Workload.of(self.transformer.blocks, len(self.batch)), self.curve.dense_tokens)
        latency = LatencyModel.from_profile(self.curve, share, search_levels(self.curve))
        levels = [int(level) for level in latency.levels]
        gains = len(levels) > 1
        timings = self._probed(labels) if gains and not self.foreign else {}
        tables = self._sensitivities(labels) if gains else {}
        fronts = []
        for reduction, label in labels.items():
            costs = np.zeros((depth, 1, 1))
            if gains:
                costs = tables[reduction].costs(levels, depth, partial(reduction.max_removed, prefix_tokens=prefix))
            probed = timings.get(reduction, [])
            fronts.append(MethodFront(reduction, label, latency, costs, self.accuracy, self.proxy.name, probed))
        return fronts

    def _probed(self, labels: Mapping[Reduction, str]) -> dict[Reduction, list[tuple[Schedule, LatencyStats]]]:
        """A few schedules of every method, timed in one run, from which follows what it costs besides the tokens."""
        n, depth, prefix = self.curve.dense_tokens, self.transformer.depth, self.transformer.prefix_tokens
        tried = {
            reduction: probe_schedules(reduction, n, prefix, depth, self.transformer.first) for reduction in labels
        }
        variants: Variants = {"dense": None}
        for reduction, schedules in tried.items():
            variants |= {f"{labels[reduction]} {name}": (reduction, schedule) for name, schedule in schedules.items()}
        timings = self.compare(variants, self.time_limit)
        return {
            reduction: [(schedule, timings[f"{labels[reduction]} {name}"]) for name, schedule in schedules.items()]
            for reduction, schedules in tried.items()
        }

    def _sensitivities(self, labels: Mapping[Reduction, str]) -> dict[Reduction, Sensitivity]:
        """Of every method, on the same images: as many as the time allows, the first few in any case.

        All methods go through a batch before any sees the next, and how large that is follows from how long the last
        one took.
        """
        transformer, began = self.transformer, time.perf_counter()
        deadline = began + self.time_limit * len(labels)
        tables = {reduction: self._sensitivity(reduction) for reduction in labels}
        weight = next((p for p in transformer.root.parameters() if p.is_floating_point()), self.images)
        dtype = self.images.dtype if torch.is_autocast_enabled(self.batch.device.type) else weight.dtype
        told = f"Sensitivity of the blocks to {', '.join(labels.values())}"
        seen, size = 0, _FIRST_IMAGES
        with ready_to_run(transformer), progress_bar(told, self.time_limit * len(labels), self.progress) as tick:
            while size and seen < len(self.images):
                started = time.perf_counter()
                images = self.images[seen : seen + size].to(self.batch.device, dtype)
                for table in tables.values():
                    table.add(images, tick)
                seen += len(images)
                now = time.perf_counter()
                fits = len(images) * max(deadline - now, 0.0) / max(now - started, 1e-9)
                size = int(min(fits, _IMAGES)) // _FIRST_IMAGES * _FIRST_IMAGES
        self.seen, self.seconds = seen, time.perf_counter() - began
        return tables

    def _sensitivity(self, reduction: Reduction) -> Sensitivity:
        n, transformer = self.curve.dense_tokens, self.transformer
        least = max(n - reduction.max_removed(n, transformer.prefix_tokens), n // 10)
        counts = np.linspace(least, n, _COUNTS + 1).round().astype(int).tolist()
        return Sensitivity(transformer, reduction, range(transformer.first, transformer.depth), counts, n)
