"""One method of a comparison: whether a model can be pruned by it, and the variants that it makes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.comparison.final_run import Target
from lightning_prune.comparison.planned_variants import PlannedVariant, chosen_text, plain_settings
from lightning_prune.comparison.requests import VariantRequest
from lightning_prune.errors import RuntimeUnavailableError, ScheduleError, UnsupportedModelError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.patching.compatibility import head_reason, last_block_reason, verified_split
from lightning_prune.patching.exact_tail import EXACT
from lightning_prune.patching.schedule_forms import allocate_schedule, reducing_block
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.method_selection import usable_methods
from lightning_prune.planning.ordered_candidates import OrderedCandidates
from lightning_prune.profiling import LatencyStats, Variant
from lightning_prune.quantization import unsupported_reason as int8_unsupported_reason
from lightning_prune.quantization.quantizer import quantizer_version
from lightning_prune.reduction import spec_of
from lightning_prune.schedule import Schedule


class ComparedMethod:
    """One method of a comparison: what it can do with one model.

    Args:
        transformer: The Vision Transformer, dense.
        request: What was asked for.
        tokens: N.
        block: The reducing block of methods that reduce once.
        grid: Rows and columns of the patches; None if they are not known.
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        request: VariantRequest,
        tokens: int,
        block: int | float,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.transformer, self.request, self.tokens = transformer, request, tokens
        self.depth, self.prefix = transformer.depth, transformer.num_prefix_tokens
        self.note = ""
        reduction = request.reduction
        self.block = 0 if reduction is None else reducing_block(reduction, block, transformer)
        self.largest = 0
        self._possible: Sequence[int] | None = None
        if reduction is not None and reduction.adaptive:
            self.note = "the images decide how many tokens go"
        elif reduction is not None:
            self.largest = reduction.max_total_removed(tokens, self.prefix, self.depth, self.block)
            self._possible = reduction.possible_counts(tokens, self.prefix, grid)
            if self._possible is not None:  # an amount is a place in the list of them, from the most tokens on
                self.largest = len(self._possible)

    def unsupported_reason(self, images: Tensor) -> str | None:
        """Why the method cannot be used with this model on this device; None if it can."""
        reduction = self.request.reduction
        if self.request.searches:
            try:
                usable_methods(list(self.request.searched), "all", self.transformer)
            except UnsupportedModelError as error:
                return str(error)
        if self.request.int8:
            reason = self._no_int8_reason(images)
            if reason is not None:
                return reason
            quantizing = self.request.quantizing
            by = quantizer_version() if quantizing is None else quantizing.name
            self.note = "; ".join(filter(None, (self.note, f"8 bits by {by}")))
        if self.request.exact:
            reason = head_reason(self.transformer, self.request.tail is True)
            reason = reason or last_block_reason(self.transformer, verified_split(self.transformer, self.depth - 1))
            return None if reason is None else f"it has no exact tail: {reason}"
        if reduction is None:
            return None
        try:
            if not reduction.adaptive and self.largest < 1:
                return f"{reduction.name} can remove none of the {self.tokens} tokens"
            schedule = None if reduction.adaptive else self._candidate(1).schedule
            with PatchHandle(self.transformer, reduction, schedule):
                self.transformer.run_eagerly(images)  # no compiled graph: this is about whether it runs
        except (UnsupportedModelError, ScheduleError) as error:
            return str(error)
        return None

    def _no_int8_reason(self, images: Tensor) -> str | None:
        """Why the model cannot run in 8 bits in the runtime; None if it can."""
        root, runtime = self.transformer.root, self.request.runtime
        try:
            quantizing = self.request.quantizing
        except RuntimeUnavailableError as error:
            return str(error)
        if quantizing is not None:
            return quantizing.unsupported_reason(root)
        if runtime.converts:
            return f"{runtime.name} has no quantizer here"
        return int8_unsupported_reason(images.device, root, images)

    def variant(self) -> Variant:
        """The only variant of a method without targets."""
        request = self.request
        method = EXACT if request.exact else request.reduction
        return Variant(method, None, request.weights, request.execution, request.tail)

    def source(self) -> OrderedCandidates:
        """The amounts of a method in its usual form: tokens that it removes, or the possible numbers in their order."""
        return OrderedCandidates(self.request.name, self._candidate, 0 if self.request.int8 else 1, self.largest)

    def _candidate(self, amount: int) -> Candidate:
        reduction = self.request.reduction
        assert reduction is not None
        counts = (self.tokens, self.prefix, self.depth, self.block)
        removed = amount if self._possible is None or not amount else self.tokens - self._possible[-amount]
        schedule = allocate_schedule(reduction, removed, *counts)
        request = self.request
        return Candidate(
            request.name,
            reduction,
            schedule,
            1.0,
            weights=request.weights,
            runtime=request.execution,
            quantized=request.quantizing is not None,
            tail=request.tail,
        )

    def planned(self, timing: LatencyStats | None = None, note: str = "") -> PlannedVariant:
        """The only variant of a method without targets, or of one that cannot be used.

        Args:
            timing: Of the final run; None if it was not part of it.
            note: A remark.
        """
        request = self.request
        return PlannedVariant(
            variant=request.name,
            request=request.name,
            method=request.method,
            int8=request.int8,
            settings=plain_settings(request.reduction),
            timing=timing,
            note=note,
            runtime=request.runtime.name,
        )

    def planned_for(self, target: Target, timing: LatencyStats, context: Mapping[str, Any]) -> PlannedVariant:
        """The variant of a target speed-up.

        Args:
            target: With a candidate.
            timing: Of the final run.
            context: What the schedule was made on.
        """
        request, candidate, speedup = self.request, target.candidate, target.budget.speedup
        assert candidate is not None
        reduction, counts = candidate.reduction, candidate.schedule
        chosen = "" if not request.searches else chosen_text(reduction, counts)
        made_on = MeasurementSource.from_context(
            context,
            dense_tokens=self.tokens,
            int8=request.int8,
            target_speedup=speedup,
            runtime=request.execution.name,
        )
        shortfall = ""
        if not counts.total_removed:
            shortfall = "8 bits alone reach it"
        elif not target.reached:
            shortfall = f"short of its target: {1 / timing.ratio:.2f}x when planning ended"
        else:
            shortfall = target.overshoot(timing)
        return PlannedVariant(
            variant=f"{request.stem} {speedup:g}x{request.suffix}",
            request=request.name,
            method=request.method,
            int8=request.int8,
            chosen=chosen,
            target_speedup=speedup,
            settings=plain_settings(reduction),
            schedule=Schedule(counts.removed, counts.method if reduction is None else spec_of(reduction), made_on),
            timing=timing,
            note="; ".join(filter(None, (chosen, "" if request.quantizing is None else self.note, shortfall))),
            runtime=request.runtime.name,
        )
