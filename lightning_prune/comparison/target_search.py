"""The search for the schedules with which a method reaches target speed-ups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from lightning_prune._utils.progress import OnStep
from lightning_prune.comparison.requests import VariantRequest
from lightning_prune.patching import VisionTransformer
from lightning_prune.planning.candidate_search import CandidateSearch, run_searches
from lightning_prune.planning.candidates import Candidate, Timings, pareto_front
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.method_front import Front
from lightning_prune.planning.method_selection import usable_methods
from lightning_prune.planning.objectives import RATIO_TOLERANCE, LatencyBudget, Objective
from lightning_prune.planning.ordered_candidates import TARGET_TUNING, OrderedCandidates, amount_grid
from lightning_prune.profiling import InterleavedTimer, Variant
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class SearchTuning:
    """Constants of the search for target speed-ups, and of the final run.

    Attributes:
        grid_points: Fewest and most amounts of the first grid.
        grid_rounds: Rounds of the first grid.
        search_rounds: Rounds of each run of the search; what it finds is verified by many more.
        final_rounds: Rounds of the run of all variants, if there is time.
        min_final_rounds: Rounds of that run in any case.
        slow_ratio: A variant slower than this, over dense, is timed in fewer rounds, so that it leaves time for others.
        settling_share: Share of the time of that run in which few rounds choose among amounts.
        verifications: How often more rounds verify the chosen amounts, and those that miss their target move on.
        verifying_share: Share of what is left of the time that one verification may take.
    """

    grid_points: tuple[int, int] = (4, 16)
    grid_rounds: int = 3
    search_rounds: int = 9
    final_rounds: int = 51
    min_final_rounds: int = 3
    slow_ratio: float = 3.0
    settling_share: float = 0.5
    verifications: int = 4
    verifying_share: float = 0.7


TUNING = SearchTuning()
_TIE = 1e-6  # of the proxy for a nat of the predicted cost
_MOST_LOOKS = 8  # times that proxies of what is proposed for the targets are measured


class VariantTimer:
    """Times candidates in rounds of one interleaved run.

    Args:
        timer: The interleaved timer; its reference is dense.
        rounds: Rounds of each candidate, if there is time.
        deadline: On the timer's clock.
        on_step: Called after every run.
        min_rounds: Rounds of each candidate in any case.
        most_rounds: Rounds after which a candidate is verified; `rounds` if None.
    """

    def __init__(
        self,
        timer: InterleavedTimer[Variant],
        rounds: int,
        deadline: float,
        on_step: OnStep,
        min_rounds: int = 1,
        most_rounds: int | None = None,
    ) -> None:
        self.timer, self.deadline, self.on_step = timer, deadline, on_step
        self.most_rounds = rounds if most_rounds is None else most_rounds
        self.rounds = min(rounds, self.most_rounds)
        self.min_rounds = min(min_rounds, self.rounds)

    def verify(self, variants: Sequence[Variant], deadline: float) -> None:
        """Times variants that were timed before in as many rounds as are missing, in most of the time that is left.

        Args:
            variants: Slow ones are left out.
            deadline: On the timer's clock.
        """
        known = {v: self.timer.result(v) for v in dict.fromkeys(variants) if self.timer.has(v)}
        few = {v: timed for v, timed in known.items() if timed.rounds < self.most_rounds}
        fast = [v for v, timed in few.items() if timed.ratio <= TUNING.slow_ratio]
        if fast:
            now = self.timer.clock()
            missing = self.most_rounds - min(few[v].rounds for v in fast)
            self.timer.measure(fast, missing, now + TUNING.verifying_share * (deadline - now), self.on_step)

    def time_variants(self, variants: Sequence[Variant]) -> None:
        """Times variants together with dense, slow ones in fewer rounds, in half of the time that is left."""
        start = self.timer.clock()
        self.timer.measure(variants, self.min_rounds, on_step=self.on_step)
        slow = [v for v in variants if self.timer.result(v).ratio > TUNING.slow_ratio]
        fast = [v for v in variants if v not in slow]
        until = start + (self.deadline - start) / 10
        few, more = min(self.rounds, TUNING.search_rounds) - self.min_rounds, self.rounds - self.min_rounds
        if slow:
            self.timer.measure(slow, max(few, 0), until, self.on_step)
        self.timer.measure(fast, more, (self.timer.clock() + self.deadline) / 2, self.on_step)

    def __call__(self, candidates: Sequence[Candidate]) -> Timings:
        """Times candidates; their timings and that of dense."""
        self.time_variants([candidate.variant for candidate in candidates])
        return self.timer.result(self.timer.reference), {c.key: self.timer.result(c.variant) for c in candidates}


def search_targets(
    timer: InterleavedTimer[Variant],
    source: OrderedCandidates,
    budgets: Sequence[LatencyBudget],
    time_limit: float,
    on_step: OnStep,
) -> dict[LatencyBudget, int]:
    """The smallest amount of a method that reaches each target, as short runs show; to be verified.

    Args:
        timer: Times variants; the time limit is on its clock.
        source: The amounts of the method. If it has no `start`, a grid over all amounts is timed first.
        budgets: The targets.
        time_limit: Seconds; one round is completed all the same.
        on_step: Called after every run.
    """
    deadline = timer.clock() + time_limit
    if not source.start:
        timer.measure([], 1, on_step=on_step)
        seconds = timer.result(timer.reference).milliseconds / 1e3
        # The first run of each amount is slow where it is compiled, converted or quantized.
        first = max(timer.warm_up(source.fastest().variant), seconds)
        on_step()
        fewest, most = TUNING.grid_points
        points = int(0.5 * time_limit / (first + timer.pace * seconds * TUNING.grid_rounds))
        amounts = amount_grid(source.smallest, source.largest, max(fewest, min(most, points)))
        grid = [source.candidate(amount) for amount in amounts]
        timer.measure([c.variant for c in grid], TUNING.grid_rounds, deadline, on_step)
        for candidate in grid:
            source.observe(candidate, timer.result(candidate.variant))
    searches = {budget: CandidateSearch(budget, [source], 1.0, tuning=TARGET_TUNING) for budget in budgets}
    timing = VariantTimer(timer, TUNING.search_rounds, deadline, on_step)
    run_searches(list(searches.values()), timing, deadline, clock=timer.clock)
    if not timer.has(timer.reference):  # a method with nothing to remove: no candidate was timed
        timer.measure([], 1, on_step=on_step)
    dense_ms = timer.result(timer.reference).milliseconds
    return {budget: source.amount(source.propose(budget, dense_ms, deadline).candidate) for budget in budgets}


def merged_front(fronts: Sequence[Front], chosen: Sequence[Candidate]) -> list[Candidate]:
    """The candidates of all methods from the slowest to the fastest.

    Of those that are merely predicted none is beaten in both latency and proxy, neither by another nor by a timed one.
    Nor do they displace a timed one: one that is predicted to be faster and no worse comes after it, for targets that
    the timed one misses. No proxy counts for more than that of dense, and of equal ones the predicted cost decides, so
    that none is chosen for a proxy above that of dense, which is noise.

    Args:
        fronts: Of the methods, and of schedules of several.
        chosen: Timed candidates with their proxies.
    """

    def key(candidate: Candidate) -> tuple[float, float]:
        return candidate.latency_ratio, _TIE * candidate.cost - min(candidate.accuracy or 0.0, 1.0)

    def beats(one: Candidate, other: Candidate) -> bool:
        return all(a <= b for a, b in zip(key(one), key(other), strict=True))

    timed = pareto_front([candidate for candidate in chosen if not candidate.is_dense], key)
    known = {candidate.key for candidate in chosen}
    predicted = [
        candidate.with_accuracy(front.cautious_estimate(candidate))
        for front in fronts
        for candidate in front.candidates
        if not candidate.is_dense and candidate.key not in known
    ]
    fitting = pareto_front([c for c in predicted if not any(beats(other, c) for other in timed)], key)
    return sorted([*timed, *fitting], key=lambda candidate: -candidate.latency_ratio)


class AutoFront(NamedTuple):
    """What `auto` chooses from at target speed-ups in one runtime, in floating point and in 8 bits.

    Attributes:
        candidates: The merged front of all methods, from the slowest to the fastest.
        start: Target -> the position, from 1 on, from which its search starts.
        left_out: Methods that there was no time to search.
        dominated: Method that is surely worse than others -> those, and the number of images after which that was
            known.
    """

    candidates: list[Candidate]
    start: dict[LatencyBudget, int]
    left_out: tuple[str, ...] = ()
    dominated: Mapping[str, tuple[Sequence[str], int]] = MappingProxyType({})


def auto_front(
    searched: Sequence[str], measured: Measurements, transformer: VisionTransformer, budgets: Sequence[LatencyBudget]
) -> AutoFront:
    """The merged front of all methods, with the position from which each target starts.

    Args:
        searched: The methods.
        measured: What planning measures.
        transformer: The Vision Transformer.
        budgets: The targets.
    """
    methods = usable_methods(list(searched), "all", transformer)
    fronts = measured.fronts(methods, budgets)
    searches = [CandidateSearch(budget, fronts, measured.dense_ms, measured.proxy_label) for budget in budgets]
    limit = measured.limit
    run_searches(searches, measured.time_candidates, limit.deadline(), 0.6, limit.clock)
    choices = {search.objective: search.result() for search in searches}
    if not all(choice.met for choice in choices.values()):  # then the order of the fastest ones decides
        _time_fastest(fronts, searches, measured)
    timed = [choice.candidate for choice in choices.values() if choice.candidate.timing]
    met = {budget: choice.candidate for budget, choice in choices.items() if choice.met}
    front, start = _front_and_starts(fronts, timed, met, budgets)
    for _ in range(_MOST_LOOKS):  # what is proposed for a target is measured, and no estimate
        sources = {source.label: source for source in fronts}
        near = [front[place] for first in start.values() for place in (first - 1, first) if 0 <= place < len(front)]
        unknown = {c.key: c for c in near if not sources[c.method].knows(c)}
        if not unknown or limit.clock() >= limit.deadline():
            break
        for candidate in unknown.values():
            sources[candidate.method].accuracy(candidate)
        front, start = _front_and_starts(fronts, timed, met, budgets)
    known = {*(one.label for one in fronts), *measured.dominated}
    known |= {label for label, (reduction, _) in methods.items() if reduction.name in measured.not_finite}
    return AutoFront(front, start, tuple(label for label in methods if label not in known), measured.dominated)


def _front_and_starts(
    fronts: Sequence[Front],
    timed: Sequence[Candidate],
    met: Mapping[Objective, Candidate],
    budgets: Sequence[LatencyBudget],
) -> tuple[list[Candidate], dict[LatencyBudget, int]]:
    """The merged front, and for each target the position of what meets it, when timed or else by its prediction."""
    front, start = merged_front(fronts, timed), {}
    for budget in budgets:
        own = [p for p, c in enumerate(front, 1) if budget in met and c.key == met[budget].key]
        wanted = (1 + RATIO_TOLERANCE) * budget.limit_ms(1.0)
        near = [position for position, candidate in enumerate(front, 1) if candidate.latency_ratio <= wanted]
        start[budget] = next(iter(own or near), len(front))
    return front, start


def _time_fastest(fronts: Sequence[Front], searches: Sequence[CandidateSearch], measured: Measurements) -> None:
    """Times the fastest candidate of each front: no prediction may decide that a target is out of reach."""
    timed = {(each.source.label, each.candidate.key) for search in searches for each in search.timed}
    fastest = [(front, front.fastest()) for front in fronts]
    missing = [(f, c) for f, c in fastest if not c.is_dense and (f.label, c.key) not in timed]
    if missing:
        _, timings = measured.time_candidates([candidate for _, candidate in missing])
        for front, candidate in missing:
            front.observe(candidate, timings[candidate.key])


def auto_source(request: VariantRequest, front: AutoFront, depth: int) -> OrderedCandidates:
    """The candidates of `auto`, or of `auto+int8`.

    In 8 bits the front is the same, but which of its candidates reaches a target is found by timing them in 8 bits:
    tokens that need not be removed there stay.

    Args:
        request: `auto`, or `auto+int8`.
        front: Of its runtime.
        depth: Number of blocks.
    """
    common: dict[str, Any] = {
        "weights": request.weights,
        "runtime": request.execution,
        "quantized": request.quantizing is not None,
        "tail": request.tail,
    }
    dense = Candidate(request.name, None, Schedule([0] * depth), 1.0, **common)

    def candidate_of(position: int) -> Candidate:
        return dense if not position else replace(front.candidates[position - 1], timing=None, **common)

    most = len(front.candidates)
    smallest, start = (0, None) if request.int8 else (min(1, most), front.start)
    end = "the fastest that was found"
    if front.left_out:
        end = f"{end}; not searched for lack of time: {', '.join(front.left_out)}"
    return OrderedCandidates(request.name, candidate_of, smallest, most, start, end)
