"""The search of all planning: propose candidates, time them against dense, correct the predictions, propose again."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lightning_prune.planning.candidates import Candidate, CandidateKey, CandidateSource, Proposal, TimeCandidates
from lightning_prune.planning.latency_model import budget_tolerance
from lightning_prune.planning.objectives import RATIO_TOLERANCE, Objective
from lightning_prune.profiling import DENSE_ACCURACY, LatencyStats
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class SearchTuning:
    """Constants of the search.

    Attributes:
        max_runs: LatencyStats runs of one search.
        min_gain: A candidate must promise a score higher by this to be worth another timing run.
        near_miss_ratio: Candidates that are predicted to miss a budget by at most this share are timed all the same if
            no other meets it.
        max_tolerance_ratio: The share by which a timing may miss a budget if that is within its noise.
    """

    max_runs: int = 5
    min_gain: float = 0.002
    near_miss_ratio: float = 0.1
    max_tolerance_ratio: float = RATIO_TOLERANCE


TUNING = SearchTuning()


class Choice(NamedTuple):
    """The result of a search.

    Attributes:
        candidate: The schedule to deploy, with its proxy and, if it was timed, its timing; dense if nothing is better.
        met: Whether the objective is met.
        reason: Why.
        dense: LatencyStats of the dense model in the run of the candidate.
    """

    candidate: Candidate
    met: bool
    reason: str
    dense: LatencyStats | None = None


class TimedCandidate(NamedTuple):
    """A candidate with its timing.

    Attributes:
        candidate: The candidate; its `timing` is set.
        source: What proposed it.
        timing: Its timing.
        dense: LatencyStats of the dense model in the same run.
    """

    candidate: Candidate
    source: CandidateSource
    timing: LatencyStats
    dense: LatencyStats


class CandidateSearch:
    """The search for one objective among the candidates of one or more sources.

    Each source proposes its best candidate by its predictions. Timings correct them, and a source whose new proposal
    promises more than all timed candidates has it timed, too, a few times at most. Only candidates that meet a latency
    budget when timed are eligible. As long as none does, sources that are predicted to miss it by little have their
    fastest candidate timed. If none does in the end, the closest is the result, with `met=False`.

    Args:
        objective: What makes one candidate better than another.
        sources: At least one, the preferred one first. They keep what they learn.
        dense_ms: Latency of the dense model.
        proxy: Name of the accuracy estimate, for the reason.
        tuning: Constants.

    Attributes:
        infeasible: Label of a source -> why it cannot meet the objective, by its last proposal.
        not_promising: Labels of sources that had nothing to propose.
        timed: The timed candidates of the sources, those of other searches in the same runs included.
    """

    def __init__(
        self,
        objective: Objective,
        sources: Sequence[CandidateSource],
        dense_ms: float,
        proxy: str = "accuracy",
        tuning: SearchTuning = TUNING,
    ) -> None:
        self.objective, self.sources, self.tuning = objective, sources, tuning
        self.infeasible: dict[str, str] = {}
        self.not_promising: list[str] = []
        self.timed: list[TimedCandidate] = []
        self._dense_ms, self._proxy, self._runs = dense_ms, proxy, 0
        self._feasible: list[tuple[CandidateSource, Proposal]] = []

    def next_candidates(
        self, deadline: float, clock: Callable[[], float] = time.perf_counter
    ) -> list[tuple[CandidateSource, Candidate]]:
        """The candidates to time next, with their sources; none if the search is over.

        Args:
            deadline: After it no source makes a proposal, except the first one its first.
            clock: Seconds.
        """
        if self._runs and (self._runs >= self.tuning.max_runs or clock() >= deadline):
            return []
        proposals: list[tuple[CandidateSource, Proposal]] = []
        self.not_promising = []
        for source in self.sources:
            if proposals and clock() >= deadline:
                break
            proposal = source.propose(self.objective, self._dense_ms, deadline)
            if proposal is None:
                self.not_promising.append(source.label)
            else:
                proposals.append((source, proposal))
        self.infeasible = {s.label: p.reason for s, p in proposals if not p.feasible}
        self._feasible = [(source, proposal) for source, proposal in proposals if proposal.feasible]
        found = [(s, p.candidate) for s, p in self._feasible if self._promises_more(s, p.candidate)]
        if not found and not self._eligible() and (self.timed or not self._feasible):
            found = self._near_misses([source for source, _ in proposals])
        self._runs += bool(found)
        return found

    def observe(self, timed: TimedCandidate) -> None:
        """Takes a timing; one of a source of another search is left out."""
        self._dense_ms, self.objective = timed.dense.milliseconds, self.objective.with_tail_of(timed.dense)
        if any(timed.source is source for source in self.sources):  # a new timing of a candidate replaces the last
            self.timed = [
                t for t in self.timed if t.source is not timed.source or t.candidate.key != timed.candidate.key
            ]
            self.timed.append(timed)

    def result(self) -> Choice:
        """The best timed candidate that meets the objective, or dense if that is better."""
        if not self.timed:
            return self._predicted()
        eligible, dense_is_feasible = self._eligible(), self.objective.dense_is_feasible(self._dense_ms)
        if not eligible and not dense_is_feasible:
            return self._closest()
        values = self._values([(t.candidate, t.source) for t in eligible])
        best_value = max(values)
        # Of equally good ones the slowest, which removes the fewest tokens.
        ties = [place for place, value in enumerate(values[:-1]) if value == best_value]
        place = max(ties, key=lambda place: eligible[place].timing.ratio, default=len(eligible))
        if place < len(eligible):
            best = eligible[place]
            return self._choice(
                best.candidate, best.source, True, self._success_reason(best.candidate, best.source), best.dense
            )
        fastest = {t.source.label: t.timing.ratio for t in sorted(self.timed, key=lambda t: -t.timing.ratio)}
        speedups = ", ".join(f"{label} {1 / ratio:.2f}x" for label, ratio in fastest.items())
        reason = f"Timed against dense ({speedups}), by the objective ({self.objective}) nothing is gained."
        last = self.timed[-1]
        return Choice(dense_candidate(last.candidate), dense_is_feasible, reason, last.dense)

    def _predicted(self) -> Choice:
        """The result without timings: the best proposal by predictions; dense if none is feasible."""
        dense_is_feasible = self.objective.dense_is_feasible(self._dense_ms)
        if not self._feasible:
            reason = " ".join(f"{label}: {reason}" for label, reason in self.infeasible.items())
            return Choice(dense_candidate(self.sources[0].fastest()), dense_is_feasible, reason)
        values = self._values([(proposal.candidate, source) for source, proposal in self._feasible])[:-1]
        source, (candidate, reason, _) = self._feasible[int(np.argmax(values))]
        if candidate.is_dense:
            return Choice(candidate, dense_is_feasible, reason)
        return self._choice(candidate, source, True, self._success_reason(candidate, source))

    def _closest(self) -> Choice:
        """The timed candidate that misses the budget by the least."""
        best = min(self.timed, key=lambda t: self.objective.violation(t.timing))
        takes = self.objective.latency_text(best.timing.milliseconds, best.timing.p90_ms)
        reason = (
            f"The {self.objective} is not met. Timed against dense, the closest takes "
            f"{100 * self.objective.violation(best.timing):.1f}% longer, {takes}: "
            f"{1 / best.timing.ratio:.2f}x is the best of the {len(self.timed)} that were timed."
        )
        return self._choice(best.candidate, best.source, False, reason, best.dense)

    @staticmethod
    def _choice(
        candidate: Candidate, source: CandidateSource, met: bool, reason: str, dense: LatencyStats | None = None
    ) -> Choice:
        return Choice(candidate.with_accuracy(source.accuracy(candidate)), met, reason, dense)

    def _success_reason(self, candidate: Candidate, source: CandidateSource) -> str:
        saved, kept = 100 * (1 - candidate.latency_ratio), source.accuracy(candidate)
        basis = "predicted" if candidate.timing is None else "timed against dense"
        less = f"{saved:.1f}% less latency ({basis})"
        how = f", by {candidate.schedule.method_label}" if candidate.is_mixed else ""
        return f"Best by {self.objective}{how}: {less}, {kept} of the dense {self._proxy}."

    def _near_misses(self, sources: Iterable[CandidateSource]) -> list[tuple[CandidateSource, Candidate]]:
        """The fastest candidates, not timed yet, that are predicted to miss a budget by little."""
        found = []
        for source in sources:
            fastest = source.fastest()
            ratios = np.array([fastest.ratio / (1 + self.tuning.near_miss_ratio), 1.0])
            near = self.objective.infeasible_reason(self._dense_ms * ratios) is None
            if near and not fastest.is_dense and fastest.key not in self._keys():
                found.append((source, fastest))
        return found

    def _promises_more(self, source: CandidateSource, candidate: Candidate) -> bool:
        """Whether a proposal may be better than all timed candidates."""
        if candidate.is_dense or candidate.key in self._keys():
            return False
        pairs = [(t.candidate, t.source) for t in self._eligible()]
        *known, value, _ = self._values([*pairs, (candidate, source)])
        return bool(value > max(known, default=-np.inf) + self.tuning.min_gain)

    def _keys(self) -> set[CandidateKey]:
        return {timed.candidate.key for timed in self.timed}

    def _eligible(self) -> list[TimedCandidate]:
        """The timed candidates that meet the latency budget."""
        limit = self.tuning.max_tolerance_ratio
        return [t for t in self.timed if self.objective.violation(t.timing) <= budget_tolerance(t.timing, limit)]

    def _values(self, candidates: Sequence[tuple[Candidate, CandidateSource]]) -> list[float]:
        """The score of each candidate, and of dense, the last; -inf for what is slower than dense.

        Latencies are cut at that of dense, so that the score of one does not depend on how slow another is.
        """
        ratios = np.array([*(candidate.latency_ratio for candidate, _ in candidates), 1.0])
        accuracy = self.objective.judged([*(source.accuracy(c) for c, source in candidates), DENSE_ACCURACY])
        values = self.objective.score_feasible(self._dense_ms * np.minimum(ratios, 1.0), accuracy)
        values = np.where(ratios > 1, -np.inf, values)
        if not self.objective.dense_is_feasible(self._dense_ms):
            values[[*(candidate.is_dense for candidate, _ in candidates), True]] = -np.inf
        return [float(value) for value in values]


def run_searches(
    searches: Sequence[CandidateSearch],
    time_candidates: TimeCandidates,
    deadline: float,
    proposal_share: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Runs searches to their end; the proposals of all searches are timed in the same runs.

    Args:
        searches: Each keeps its result.
        time_candidates: Times candidates and the dense model in one interleaved run.
        deadline: No further run begins if it is expected to end later; the first run is made in any case.
        proposal_share: Share of the remaining time after which no further proxy is measured before the next run.
        clock: Seconds.
    """
    last_run = 0.0
    while True:
        until = clock() + proposal_share * max(deadline - last_run - clock(), 0.0)
        waiting: dict[tuple[str, CandidateKey], tuple[CandidateSource, Candidate]] = {}
        for search in searches:
            for source, candidate in search.next_candidates(until, clock):
                waiting[source.label, candidate.key] = source, candidate
        if not waiting:
            return
        started = clock()
        dense, timings = time_candidates([candidate for _, candidate in waiting.values()])
        last_run = clock() - started
        for source, candidate in waiting.values():
            timing = timings[candidate.key]
            source.observe(candidate, timing)
            timed = TimedCandidate(replace(candidate, timing=timing), source, timing, dense)
            for search in searches:
                search.observe(timed)


def dense_candidate(candidate: Candidate) -> Candidate:
    """The dense model as a candidate of the same method."""
    nothing = Schedule([0] * candidate.schedule.depth)
    return Candidate(candidate.method, candidate.reduction, nothing, 1.0, accuracy=1.0, runtime=candidate.runtime)
