"""What a run is decided by: a decision that was given, that of an earlier run while it holds, or a new one."""

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_prune.callbacks.compiled_run import warn_if_wrapped_by_compile
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.decision_panel import print_decision
from lightning_prune.callbacks.decision_reuse import DecisionConditions, checked_anew
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.callbacks.given_schedule import time_adaptive, time_given
from lightning_prune.callbacks.planned_schedule import planned
from lightning_prune.errors import DataError
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.models import restoring
from lightning_prune.planning.api import PROFILE_SHARE
from lightning_prune.profiling import LatencyProfile
from lightning_prune.profiling.measurement import check_dense
from lightning_prune.profiling.model_identity import structure
from lightning_prune.profiling.profile_reuse import CachedProfile, holds

_LATER_SHARE = 0.25  # of the time limit, for a later validation of `fit`: its latency profile is known


class Decider:
    """Decides for one run after another, and remembers what the last decision depends on.

    Attributes:
        decision: What was decided last; None before, and where nothing could be decided.
        is_given: Whether `decision` was given, and holds for all runs.
        keywords: Further arguments of the transformer for which `decision` was made.
        call_differs: Whether steps were seen to pass something else to the transformer than `forward` of the module.
    """

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self.is_given = False
        self.keywords: Mapping[str, Any] = {}
        self.call_differs = False
        self._known: DecisionConditions | None = None  # of `decision`; None: it holds for no run

    def __getstate__(self) -> dict[str, Any]:
        """Without the measured model: a copy decides again, for the model of its own runs."""
        return {**vars(self), "_known": None}

    @property
    def has_decided(self) -> bool:
        """Whether there is a decision that may hold for the next run."""
        return self._known is not None

    def is_of(self, transformer: VisionTransformer) -> bool:
        """Whether the last decision is of a transformer as it is built now.

        Args:
            transformer: The Vision Transformer of the next run.
        """
        known, root = self._known, transformer.root
        here = structure(transformer.outer)
        return known is not None and known.root() is root and known.latency["structure"] == here

    def give(self, decision: Decision) -> None:
        """Makes a decision hold for all runs."""
        self.decision, self.keywords, self.is_given = decision, {}, True

    def forget(self) -> None:
        """Makes the next run decide again."""
        self._known, self.is_given, self.call_differs = None, False, False

    def decide(self, first: FirstBatch, is_refuted: bool = False) -> Decision | None:
        """Returns the decision of an earlier run if it holds for this one, else a new one, which is printed.

        Args:
            first: The first batch of the run, with the model dense.
            is_refuted: Whether the last decision was made in this run, for something else than what runs.

        Returns:
            None in training where no decision can be made, as for outputs that are not finite: that ends no training.
        """
        with restoring(first.config.restore):
            return self._decide(first, is_refuted)

    def _decide(self, first: FirstBatch, is_refuted: bool) -> Decision | None:
        start = perf_counter()
        check_dense(first.transformer)  # also if nothing is measured: a patch of the user would be replaced
        if self.is_given and self.decision is not None:
            return self.decision
        conditions, earlier = DecisionConditions.of(first), self.decision
        same_latency = self._known is not None and self._known.same_latency(conditions)
        if same_latency and earlier is not None and not is_refuted:
            known = self._known
            same_accuracy = known is not None and known.accuracy == conditions.accuracy
            kept = earlier if same_accuracy else checked_anew(first, earlier)
            if kept is not None:
                self.decision, self._known = kept, conditions
                return kept
        warn_if_wrapped_by_compile(first.module, first.transformer)
        profile = earlier.plan.profile if same_latency and earlier is not None and earlier.plan is not None else None
        try:
            decision = replace(_decide_anew(first, profile, is_refuted), seconds=perf_counter() - start)
        except DataError as error:
            if first.trainer.state.fn != "fit":
                raise
            rank_zero_warn(f"This validation is dense, as no schedule can be decided: {error}")
            self.decision = None
            return None
        self.decision, self._known = decision, conditions
        for difference in decision.differences:
            rank_zero_warn(f"The schedule was made elsewhere: {difference}.")
        if first.config.verbose:
            print_decision(decision)
        return decision


def _decide_anew(first: FirstBatch, profile: LatencyProfile | None, is_refuted: bool) -> Decision:
    """Plans a schedule, or times what was given, against the dense model.

    Args:
        first: The first batch.
        profile: The latency profile of the last decision, if it is of the same model under the same conditions.
        is_refuted: As in `Decider.decide`.
    """
    config = first.config
    if not config.is_planned:
        return time_adaptive(first) if config.is_adaptive else time_given(first)
    in_fit = first.trainer.state.fn == "fit"
    kept = CachedProfile(profile, reused=True) if profile is not None and (in_fit or is_refuted) else None
    if kept is not None and not is_refuted:  # of an earlier epoch, since when the machine may have changed its speed
        if config.protocol == "paper" or holds(
            kept.profile,
            first.module,
            first.images,
            time_limit=PROFILE_SHARE * config.time_limit,
            module_path=config.module_path,
            clock=first.limit.clock,
        ):
            first = first.within(_LATER_SHARE)
        else:
            kept = None
    if config.verbose and config.protocol == "deployed":
        name = " (`time_limit`)" if first.limit.seconds == config.time_limit else ""
        print(f"Planning a schedule for this device and batch takes up to {first.limit.seconds:.3g} s{name}.")
    return planned(first, kept)
