"""The first batch of a comparison: what is known already, schedules and latencies of all variants, token traces."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lightning_prune._utils.digests import tensor_digest, weights_digest
from lightning_prune._utils.isolation import user_hooks
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.callbacks.batches import Calibration
from lightning_prune.callbacks.first_batch import FirstBatch, open_first_batch
from lightning_prune.callbacks.rank_agreement import join_decision, on_rank_zero
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.comparison.comparison_planning import ComparisonPlanner
from lightning_prune.comparison.fingerprints import data_identity, fingerprint_of
from lightning_prune.comparison.objective_planning import given_variant
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant, reduction_of
from lightning_prune.comparison.requests import ComparisonSettings
from lightning_prune.comparison.resume import ResumeState, VariantResult
from lightning_prune.errors import RuntimeUnavailableError
from lightning_prune.patching import TokenTrace, trace_tokens
from lightning_prune.profiling.clocks import read_clock
from lightning_prune.profiling.environment import model_conditions, unknown_conditions
from lightning_prune.profiling.model_identity import UNKNOWN
from lightning_prune.quantization.quantizer import quantizer_version
from lightning_prune.runtimes.calibration import CALIBRATION_IMAGES, calibrating_with

_PICTURES = 4  # images whose tokens are traced


class ComparisonSetup(L.Callback):
    """Plans all variants on the first batch of a validation run of one batch, unless that is known already.

    Args:
        settings: What was asked for.
        on_message: Called with lines about the progress, on rank 0.
        clock: What latencies are timed by, and the seconds of the time limit.

    Attributes:
        plan: The plan; None before the first batch.
        results: Results of variants that were validated before.
        state: What is known on disk; None on ranks other than 0, where nothing is written, and where the results depend
            on what cannot be compared between two runs, as a hook of the user.
        calibration: Images that the quantizers of runtimes are calibrated on; None where none is used.
        pictures: A few images of the dataset, on rank 0.
        traces: Variant -> what became of their patches, on rank 0.
    """

    def __init__(
        self,
        settings: ComparisonSettings,
        on_message: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings, self.on_message, self.clock = settings, on_message, clock
        self.plan: ComparisonPlan | None = None
        self.results: dict[str, VariantResult] = {}
        self.state: ResumeState | None = None
        self.calibration: Tensor | None = None
        self.pictures: Tensor | None = None
        self.traces: dict[str, TokenTrace] = {}

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Plans, once."""
        if self.plan is None and not dataloader_idx:
            with open_first_batch(trainer, pl_module, batch, self.settings.config) as first:
                self.plan, self.results, self.calibration = on_rank_zero(trainer, lambda: self._set_up(first))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes part in the decision of the other ranks, where this one had no batch."""
        if self.plan is None:
            self.plan, self.results, self.calibration = join_decision(trainer) or (None, {}, None)

    def _set_up(self, first: FirstBatch) -> tuple[ComparisonPlan, dict[str, VariantResult], Tensor | None]:
        clock = read_clock(self.clock, first.images.device.type)
        limit = TimeLimit(self.settings.config.time_limit, clock)
        given = {r.name: given_variant(first, r) for r in self.settings.requests if r.schedule is not None}
        calibration = None
        if any(request.searches or request.objective is not None for request in self.settings.requests):
            calibration = first.calibration()
        if self._quantizers():
            self.calibration = first.from_all_over(CALIBRATION_IMAGES).cpu()
        if self.settings.output is not None:
            self.state = self._open_state(self.settings.output, self._fingerprint(first, calibration))
        plan = self.state.plan() if self.state is not None else None
        if plan is None:
            self._report_other_states()
            planner = ComparisonPlanner(first, self.settings, calibration, given, limit, self.on_message, self.state)
            with calibrating_with(self.calibration):
                plan = planner.plan()
            if self.state is not None:
                self.state.keep_plan(plan)
        results = self._known_results(plan)
        pictures = first.from_all_over(_PICTURES)
        self.pictures = pictures.detach().cpu()
        self.traces = self._trace(first, pictures, plan)
        return plan, results, self.calibration

    def _open_state(self, output: Path, fingerprint: dict[str, Any]) -> ResumeState | None:
        """What is known on disk; None, with a message, where nobody can know whether it is of the same comparison."""
        unknown = unknown_conditions(fingerprint)
        if unknown:
            self.on_message(
                "Nothing is resumed and nothing is kept for a later run, since the results depend on what cannot be "
                f"compared between two runs: {', '.join(unknown)}."
            )
            return None
        return ResumeState(output, fingerprint, self.settings.resume)

    def _fingerprint(self, first: FirstBatch, calibration: Calibration | None) -> dict[str, Any]:
        config, module = self.settings.config, first.module
        settings: dict[str, Any] = {
            "module": f"{type(module).__module__}.{type(module).__qualname__}",
            "hooks": UNKNOWN if user_hooks(module) else "",  # also around the transformer: accuracy depends on them
            "block": config.block,
            "proxy": config.proxy,
            "time_limit": config.time_limit,
            "module_path": config.module_path,
            "protocol": config.protocol,
            "runtimes": [runtime.name for runtime in self.settings.runtimes],
        }
        if self.settings.metric is not None:
            settings |= {"metric": self.settings.metric}
        if first.trainer.world_size > 1:  # images are kept in the order of the processes
            settings |= {"processes": first.trainer.world_size}
        if self.calibration is not None:
            settings |= {"quantizers": [*self._quantizers(), tensor_digest(self.calibration)]}
        if any(request.int8 and not request.runtime.converts for request in self.settings.requests):
            settings |= {"int8": quantizer_version()}
        if calibration is not None:
            settings |= {"calibration": tensor_digest(calibration.images), "seed": config.seed}
        if isinstance(module, ImageClassifier) and module.names_of_groups() is not None:
            settings |= {"groups": module.names_of_groups()}
        return fingerprint_of(
            weights=weights_digest(module),
            data=data_identity(first.trainer.val_dataloaders, first.batch, self.settings.limit_val_batches),
            conditions=model_conditions(first.transformer, first.images, self.clock),
            requests=self.settings.requests,
            speedups=self.settings.speedups,
            settings=settings,
        )

    def _quantizers(self) -> list[str]:
        """The quantizers of the runtimes that run a request in 8 bits."""
        found = []
        for request in self.settings.requests:
            try:
                quantizing = request.quantizing
            except RuntimeUnavailableError:  # its row says so
                continue
            if quantizing is not None:
                found.append(str(quantizing.context()["quantization"]))
        return sorted(set(found))

    def _known_results(self, plan: ComparisonPlan) -> dict[str, VariantResult]:
        if self.state is None:
            return {}
        variants = [planned.variant for planned in plan.planned if planned.timing is not None]
        found = {variant: self.state.result(variant) for variant in variants}
        known = {variant: result for variant, result in found.items() if result is not None}
        if known:
            count = f"{len(known)} of {len(variants)} variants were finished before"
            self.on_message(f"Resuming from {self.state.folder}: {count}.")
        return known

    def _report_other_states(self) -> None:
        if self.state is None:
            return
        folder, changed, unreadable = self.state.folder.parent, self.state.changed_settings(), self.state.unreadable()
        if changed:
            verb = "differ" if len(changed) > 1 or changed[0].endswith("s") else "differs"
            self.on_message(f"A new comparison: {', '.join(changed)} {verb} from what is kept in {folder}.")
        if unreadable:
            names = ", ".join(path.name for path in unreadable)
            self.on_message(f"Not resumed, since another release wrote them or they are damaged: {names} in {folder}.")

    def _trace(self, first: FirstBatch, images: Tensor, plan: ComparisonPlan) -> dict[str, TokenTrace]:
        """One variant of each request in float: at the largest target that all reach, where there is one."""
        variants: dict[str, list[PlannedVariant]] = {}
        first_runtime = self.settings.runtimes[0]
        reducing = [r for r in self.settings.requests if not (r.int8 or r.exact) and r.method]
        requests = {r.name: r for r in reducing if r.runtime == first_runtime}
        for planned in plan.planned:
            removes = planned.schedule is None or planned.schedule.total_removed > 0
            if planned.timing is not None and planned.request in requests and removes:
                variants.setdefault(planned.request, []).append(planned)
        with_targets = [group for group in variants.values() if group[0].target_speedup is not None]
        shared = [s for s in self.settings.speedups if all(s in {p.target_speedup for p in g} for g in with_targets)]
        traces = {}
        for name, group in variants.items():
            middle = group[len(group) // 2]
            chosen = next((p for p in group if shared and p.target_speedup == shared[-1]), middle)
            reduction, path = reduction_of(chosen, requests[name]), self.settings.config.module_path
            if reduction is None:  # the schedule names a method for each block
                assert chosen.schedule is not None
                trace = trace_tokens(first.module, images, chosen.schedule, module_path=path)
            else:
                trace = trace_tokens(first.module, images, reduction, chosen.schedule, module_path=path)
            traces[chosen.variant] = TokenTrace(trace.groups.cpu(), trace.held.cpu(), trace.tokens.cpu(), trace.grid)
        return traces
