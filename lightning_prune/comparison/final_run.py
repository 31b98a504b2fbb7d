"""The run in which all variants of a comparison are timed together, and the energy of each."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune._utils.device import between_runs
from lightning_prune._utils.progress import OnStep
from lightning_prune.comparison.planned_variants import UnreachedTarget
from lightning_prune.comparison.target_search import TUNING, VariantTimer
from lightning_prune.patching import VisionTransformer
from lightning_prune.planning.candidate_search import CandidateSearch, TimedCandidate, run_searches
from lightning_prune.planning.candidates import Candidate, Timings
from lightning_prune.planning.latency_model import budget_tolerance
from lightning_prune.planning.objectives import LatencyBudget
from lightning_prune.planning.ordered_candidates import OrderedCandidates
from lightning_prune.profiling import InterleavedTimer, LatencyStats, Variant, VariantSwitch
from lightning_prune.profiling.environment import precision
from lightning_prune.profiling.latency_profile import SAVING
from lightning_prune.profiling.model_variants import settle_seconds
from lightning_prune.runtimes import Runtime, TorchEager, is_compiled
from lightning_prune.runtimes.in_place import force_eager, uncompiled


class _EagerFloat32(TorchEager):
    """The runtime of `EAGER`; no user can name it."""

    name = "torch (float32)"


EAGER = Variant(runtime=_EagerFloat32())
"""The dense model in float32 and PyTorch without compilation, whatever the variants run in."""


@dataclass
class Target:
    """A target speed-up of one method, with what was found for it.

    Attributes:
        budget: The target.
        source: The amounts of the method.
        search: The search of the final run.
        candidate: The candidate that reaches the target, or comes nearest.
        reached: Whether it does.
        exhausted: Whether the largest amount does not reach it.
        best_speedup: The largest speed-up that was timed.
    """

    budget: LatencyBudget
    source: OrderedCandidates
    search: CandidateSearch
    candidate: Candidate | None = None
    reached: bool = False
    exhausted: bool = False
    best_speedup: float = 0.0

    def observe(self, candidate: Candidate, timer: InterleavedTimer[Variant]) -> None:
        """Takes the timing of a candidate of the search again, which more rounds have changed.

        Args:
            candidate: One that the search has timed.
            timer: Has its rounds.
        """
        if timer.has(candidate.variant) and not candidate.is_dense:
            timing, dense = timer.result(candidate.variant), timer.result(timer.reference)
            self.source.observe(candidate, timing)
            self.search.observe(TimedCandidate(replace(candidate, timing=timing), self.source, timing, dense))

    def overshoot(self, timing: LatencyStats) -> str:
        """What is said of a candidate that is faster than its target by more than the noise; empty for another one.

        Args:
            timing: Of the candidate, in the final run.
        """
        wanted = 1 / float(self.budget.speedup or 1)
        if self.candidate is None or timing.ratio >= wanted * (1 - budget_tolerance(timing, SAVING)):
            return ""
        amount = self.source.amount(self.candidate)
        below = max((each for each in self.source.timings if each < amount), default=None)
        if amount <= self.source.smallest:
            return "the smallest amount"
        if below is None:
            return "smaller amounts were not timed"
        misses = f"misses: {1 / self.source.timings[below].ratio:.2f}x"
        if below == amount - 1:
            return f"next smaller amount {misses}"
        removed = self.source.candidate(below).schedule.total_removed
        return f"R = {removed} {misses}; what lies between was not timed"

    def unreached(self, method: str) -> UnreachedTarget:
        """What is said of the target if no amount reaches it.

        Args:
            method: The method, as the user calls it.
        """
        reason = f"timed up to {self.source.fastest().schedule}, {self.source.end}"
        if not self.source.largest:
            reason = "no schedule was found that takes less time than dense"
        return UnreachedTarget(method, float(self.budget.speedup or 1), self.best_speedup, reason)


class FinalTimer:
    """Times variants in several runtimes in one interleaved run, each against dense in its own runtime.

    `EAGER`, the dense model in float32 and PyTorch without compilation, is part of every round where it is none of the
    variants. To be used inside `ready_to_run`; `close` makes the model as it was.

    Args:
        transformer: The Vision Transformer, dense.
        images: (B, C, H, W) on its device.
        runtimes: What executes the variants.
        clock: Seconds.

    Attributes:
        timer: The interleaved timer; its reference is dense in the first runtime.
    """

    def __init__(
        self, transformer: VisionTransformer, images: Tensor, runtimes: Sequence[Runtime], clock: Callable[[], float]
    ) -> None:
        self._transformer, self._images, self._runtimes = transformer, images, runtimes
        self._switch, self._stack = VariantSwitch(transformer), ExitStack()
        self._run: Callable[[], object] = self._as_it_is
        is_eager = not is_compiled(transformer.compiled_root)
        is_float32 = precision(transformer.outer, images.device) == "float32"
        is_among = is_eager and is_float32 and any(isinstance(runtime, TorchEager) for runtime in runtimes)
        self._eager = Variant(runtime=TorchEager()) if is_among else EAGER
        self._run_eager = None if is_among else _float32_run(transformer, images)
        self.timer = InterleavedTimer[Variant](
            prepare=self._prepare,
            run=lambda: self._run(),
            synchronize=between_runs(images.device),
            reference=Variant(runtime=runtimes[0]),
            clock=clock,
            references=self._references,
            settle_seconds=settle_seconds([*runtimes, self._eager.runtime]),
        )

    def speedup_vs_eager(self, variant: Variant) -> float | None:
        """Latency of `EAGER` over that of a variant; None where the model has no copy in float32."""
        known = self._eager != EAGER or self._run_eager is not None
        return 1 / self.timer.result(variant, self._eager).ratio if known else None

    def close(self) -> None:
        """Makes the model dense again, in the runtime that it had."""
        self._stack.close()
        self._switch.off()

    def _references(self, variant: Variant) -> list[Variant]:
        dense = self._dense_of(variant)
        return dense if self._eager == EAGER and self._run_eager is None else [*dense, self._eager]

    def _dense_of(self, variant: Variant) -> list[Variant]:
        """The dense models that a variant is compared with: that of its runtime, and of one in 8 bits that in float."""
        if variant == EAGER or variant.runtime is None:
            return []
        runtimes = dict.fromkeys((variant.runtime, variant.runtime.unquantized))
        return [Variant(runtime=runtime) for runtime in runtimes if runtime in self._runtimes]

    def _prepare(self, variant: Variant) -> None:
        self._stack.close()
        if variant == EAGER:
            self._switch.to(Variant(runtime=TorchEager()))
            self._stack.enter_context(uncompiled(self._transformer.outer))  # what the user compiled, too
            assert self._run_eager is not None
            self._run = self._run_eager
        else:
            self._switch.to(variant)
            self._run = self._as_it_is

    def _as_it_is(self) -> object:
        return self._transformer.compiled_root(self._images)


def _float32_run(transformer: VisionTransformer, images: Tensor) -> Callable[[], object] | None:
    """Runs the dense model in float32; None where it cannot be copied to that."""
    model = transformer.outer
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        try:
            with uncompiled(model):
                model = copy.deepcopy(model).float()
        except (RuntimeError, TypeError, ValueError):  # too large for a second time, or it holds what cannot be copied
            return None
    inputs = images.float()

    def run() -> object:
        with force_eager(), torch.autocast(images.device.type, enabled=False):  # a wrapper in the model may compile
            return model(inputs)

    return run


def verify_targets(
    timer: InterleavedTimer[Variant],
    targets: Sequence[Target],
    others: Sequence[Variant],
    rounds: int,
    time_limit: float,
    on_step: OnStep,
) -> None:
    """Times all variants in one interleaved run; a target that is missed moves on to another amount.

    Args:
        timer: A fresh one: the timings of the search chose the amounts, and so speak too well of them.
        targets: Changed in place; their sources must be restarted.
        others: Variants without a target.
        rounds: Rounds of each variant, if time allows.
        time_limit: Seconds; three rounds of each variant, also of those that are chosen, are completed all the same.
        on_step: Called after every run.
    """
    start = timer.clock()
    deadline = start + time_limit
    timing = VariantTimer(
        timer,
        TUNING.search_rounds,
        start + TUNING.settling_share * time_limit,
        on_step,
        TUNING.min_final_rounds,
        rounds,
    )
    untimed = list(others)
    searches = [target.search for target in targets]

    def time_candidates(candidates: Sequence[Candidate]) -> Timings:
        timing.time_variants(list(dict.fromkeys([*untimed, *(candidate.variant for candidate in candidates)])))
        untimed.clear()
        return timer.result(timer.reference), {c.key: timer.result(c.variant) for c in candidates}

    run_searches(searches, time_candidates, timing.deadline, clock=timer.clock)
    if untimed:  # no search had anything to time
        timing.time_variants(untimed)
    timing.deadline = deadline
    # Few rounds chose the amounts, and so speak too well of them: more verify them, and what misses then moves on.
    for _ in range(TUNING.verifications):
        chosen = [target.search.result().candidate for target in targets]
        timing.verify([*others, *(candidate.variant for candidate in chosen)], deadline)
        for target, candidate in zip(targets, chosen, strict=True):
            target.observe(candidate, timer)
        run_searches(searches, time_candidates, deadline, clock=timer.clock)
        if [target.search.result().candidate.key for target in targets] == [candidate.key for candidate in chosen]:
            break
    for target in targets:
        choice, source = target.search.result(), target.source
        target.candidate, target.reached = choice.candidate, choice.met
        fails = not source.largest or source.reaches(source.largest, target.budget, 1.0) is False
        target.exhausted = not choice.met and fails
        target.best_speedup = max((1 / timed.timing.ratio for timed in target.search.timed), default=1.0)
    # Whatever the searches had time for: without a complete round a variant has no latency.
    wanted = [*others, *(target.candidate.variant for target in targets if target.candidate is not None)]
    missing = [variant for variant in dict.fromkeys(wanted) if not timer.has(variant)]
    if missing:
        timing.time_variants(missing)
