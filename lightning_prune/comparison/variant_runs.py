"""Validating the variants of a comparison, each as it will run, and those that run alike once."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import fmean
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_prune._utils.progress import progress_bar
from lightning_prune.callbacks.hooks import EvaluationCallback, command_run
from lightning_prune.callbacks.rank_agreement import refuse_sharded
from lightning_prune.classification.evaluation import Evaluation
from lightning_prune.comparison.first_loader import FirstLoader
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant, variant_of
from lightning_prune.comparison.predictions import PredictionRecorder
from lightning_prune.comparison.requests import ComparisonSettings, VariantRequest
from lightning_prune.comparison.resume import ResumeState, VariantResult
from lightning_prune.comparison.step_values import StepValues
from lightning_prune.comparison.validation_progress import ValidationProgress
from lightning_prune.errors import DataError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling import Variant, VariantSwitch
from lightning_prune.schedule import KeepRates, Schedule

_RATES = ("val/throughput", "val/throughput_end_to_end")  # what outputs that are no numbers say nothing against
_LISTED = 5  # images that a note names


class Deployment(EvaluationCallback):
    """Makes the Vision Transformer of a LightningModule run as a variant from the first batch to the end of a run.

    Args:
        variant: What to run as.
        dense_tokens: N, of the images that the variant was planned for.
        module_path: Dotted path of the transformer, where there are several.
    """

    def __init__(self, variant: Variant, dense_tokens: int, module_path: str | None) -> None:
        self.variant, self.dense_tokens, self.module_path = variant, dense_tokens, module_path
        self._switch: VariantSwitch | None = None

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._switch is not None:
            return
        refuse_sharded(trainer)
        transformer = find_vision_transformer(pl_module, self.module_path)
        variant = self.variant
        if isinstance(variant.schedule, Schedule) and transformer.num_tokens is None:  # images of other sizes may come
            rates = KeepRates.of(variant.schedule, self.dense_tokens, transformer.num_prefix_tokens)
            variant = variant._replace(schedule=rates)
        self._switch = VariantSwitch(transformer)  # before anything can fail: `_close` restores what is changed
        self._switch.to(variant)

    def _figures(self) -> dict[str, float]:
        return {}

    def _close(self, trainer: L.Trainer) -> None:
        switch, self._switch = self._switch, None
        if switch is not None:
            switch.off()


def validate_variants(
    trainer: L.Trainer,
    module: L.LightningModule,
    loader: FirstLoader,
    settings: ComparisonSettings,
    plan: ComparisonPlan,
    known: Mapping[str, VariantResult],
    state: ResumeState | None,
    report: Callable[[str], Any],
) -> dict[str, VariantResult]:
    """Validates every variant that can be run and has no result yet; variants that run alike are validated once.

    Args:
        trainer: Runs the validations.
        module: Contains the Vision Transformer; dense again afterwards.
        loader: The validation data.
        settings: What was asked for.
        plan: The variants.
        known: Variant -> result of an earlier run.
        state: Where results are kept; None where they are not.
        report: Called with lines about the progress.
    """
    results, config = dict(known), settings.config
    requests, progress = {request.name: request for request in settings.requests}, ValidationProgress()
    denses = {p.variant for p in plan.planned if p.is_dense}
    runs = {p.variant: _run_as(p, requests[p.request]) for p in plan.planned if p.timing is not None}
    for number, (name, variant) in enumerate(runs.items(), 1):
        if name in results:
            continue
        alike = next((other for other in results if runs[other] == variant), None)
        if alike is not None:
            results[name] = results[alike]
        else:
            report(f"Validating {name} ({number} of {len(runs)})")
            deployment = Deployment(variant, plan.dense_tokens, config.module_path)
            recorder = PredictionRecorder(config.module_path, config.images_from_batch)
            values = [] if settings.metric is None else [StepValues(settings.metric, config.images_from_batch)]
            own = replace(config, runtime=variant.runtime.name) if variant.runtime is not None else config
            progress.runs_left = len({other for each, other in runs.items() if each not in results})
            is_dense = name in denses
            with (
                progress_bar(f"Validating {name} ({number} of {len(runs)})", None, config.verbose),
                nullcontext() if is_dense else _counting_broken(module),
                command_run(trainer, own, deployment, recorder, progress, *values),
                loader.arguments() as arguments,
            ):
                metrics = trainer.validate(module, verbose=False, **arguments)
            exit_if_terminated(trainer)
            results[name] = _result(flat_metrics(metrics), recorder, *values)
            if is_dense and results[name].broken:
                raise DataError(f"The outputs of the dense model must be finite, got {results[name].broken}.")
        if state is not None:
            state.keep_result(name, results[name])
    return results


def _result(metrics: dict[str, float], recorder: PredictionRecorder, step: StepValues | None = None) -> VariantResult:
    """The outcome of a validation; without accuracy where outputs are not finite, as no class follows from these."""
    if not recorder.broken:
        values = None
        if step is not None and step.values:
            metrics = {**metrics, step.name: fmean(step.values)}
            values = None if step.is_shuffled else tuple(step.values)
        return VariantResult(metrics, recorder.images, recorder.predictions, recorder.missing, values=values)
    rates = {name: value for name, value in metrics.items() if name in _RATES}
    count = len(recorder.broken)
    listed = ", ".join(map(str, recorder.broken[:_LISTED])) + (", ..." if count > _LISTED else "")
    broken = f"NaN or infinite outputs for {count} of {recorder.images} images ({listed}): no accuracy"
    return VariantResult(rates, recorder.images, None, "", broken)


def _counting_broken(module: L.LightningModule) -> AbstractContextManager[None]:
    """Outputs that are not finite end no validation, where the module is one of this package."""
    evaluation = getattr(module, "evaluation", None)
    return evaluation.counting_broken() if isinstance(evaluation, Evaluation) else nullcontext()


def exit_if_terminated(trainer: L.Trainer) -> None:
    """Ends the process if SIGTERM came in the last run: Lightning does not end a run for it in its last batch.

    Args:
        trainer: Whose run is over.

    Raises:
        SIGTERMException: If it came.
    """
    if trainer.received_sigterm:
        raise SIGTERMException


def flat_metrics(metrics: Any) -> dict[str, float]:
    """What `trainer.validate` returned, as plain numbers; of several loaders those of the first, without its number."""
    first = dict(metrics[0]) if metrics else {}
    return {name.removesuffix("/dataloader_idx_0"): float(value) for name, value in first.items()}


def _run_as(planned: PlannedVariant, request: VariantRequest) -> Variant:
    """What a validation runs as: keep rates hold for images of all sizes."""
    variant = variant_of(planned, request)
    return variant if planned.keep_rates is None else variant._replace(schedule=planned.keep_rates)
