"""Dense against the schedules of several objectives."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_prune._utils.sampler_shares import shares_of
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.batches import Calibration, images_from_batch
from lightning_prune.callbacks.decision import (
    Decision,
    check_labels,
    decide,
    planned_for,
    profiled,
)
from lightning_prune.callbacks.first_batch import FirstBatch, first_batch
from lightning_prune.callbacks.hooks import EvaluationCallback, command_run
from lightning_prune.comparison.paired_statistics import compared, environment_columns, flat, logged, timed
from lightning_prune.comparison.predictions import OutcomeRecorder, Outcomes
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.patching import PatchHandle, find_vision_transformer, patch
from lightning_prune.planning import AccuracyBudget, Objective
from lightning_prune.profiling import LatencyStats, compare_latency
from lightning_prune.report.rows import Row
from lightning_prune.schedule import Schedule


class Survey(L.Callback):
    """Decides every variant on the first batch of a dense validation run, and counts the images of the run.

    One latency profile and one accuracy curve serve all objectives, and all variants are timed in one interleaved run.

    Args:
        config: The settings that the variants share.
        objectives: Name of a variant -> what it optimises.
    """

    def __init__(self, config: PruningConfig, objectives: dict[str, Objective]) -> None:
        self.config, self.objectives = config, objectives
        self.decisions: dict[str, Decision] = {}
        self.timings: dict[str, LatencyStats] = {}
        self.images = 0
        self.seconds = 0.0

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Decides, once."""
        if dataloader_idx:  # the table is of the first loader
            return
        count = len(images_from_batch(batch, self.config.images_from_batch))
        share = shares_of(trainer)[0]
        self.images += count if share is None else share.counted(batch_idx, count)
        if not self.timings:
            start = perf_counter()
            with first_batch(trainer, pl_module, batch, self.config) as first:
                self.decisions, self.timings = first.on_rank_zero(lambda: self._decide(first))
            self.seconds = perf_counter() - start

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds up the images of all ranks."""
        count = torch.tensor(self.images, device=pl_module.device)
        self.images = int(trainer.strategy.reduce(count, reduce_op="sum"))

    def _decide(self, first: FirstBatch) -> tuple[dict[str, Decision], dict[str, LatencyStats]]:
        config = self.config
        if config.is_planned:
            decisions = self._planned(first.module, first.images, first.calibration())
        else:
            decisions = {f"{config.label} given": decide(first)}
        variants: dict[str, tuple[Any, Schedule] | None] = {"dense": None}
        variants |= {
            n: (d.reduction or config.reduction, d.schedule) for n, d in decisions.items() if d.schedule.total_removed
        }
        timings = compare_latency(
            first.module,
            first.images,
            variants,
            rounds=51,
            time_limit=config.time_limit,
            module_path=config.module_path,
            verbose=config.verbose,
        )
        decisions = {name: _confirmed(decision, timings, name) for name, decision in decisions.items()}
        # A variant that removes nothing is the dense model: timing it again would only add noise.
        timings |= {
            name: timings["dense"] for name, decision in decisions.items() if not decision.schedule.total_removed
        }
        return decisions, timings

    def _planned(self, pl_module: L.LightningModule, images: Tensor, calibration: Calibration) -> dict[str, Decision]:
        config, objectives = self.config, list(self.objectives.values())
        check_labels(config, calibration)
        found = profiled(config, pl_module, images)
        decisions = planned_for(config, pl_module, images, calibration, objectives, found)
        return dict(zip(self.objectives, decisions, strict=True))


def _confirmed(decision: Decision, timings: dict[str, LatencyStats], name: str) -> Decision:
    """The decision with its latency from the run of all variants; one that is not faster there removes nothing."""
    if name not in timings:
        return replace(decision, dense_ms=timings["dense"].milliseconds, latency_ms=timings["dense"].milliseconds)
    dense, pruned = timings["dense"], timings[name]
    if decision.plan is not None:
        confirmed = replace(decision.plan, dense=dense, pruned=pruned).or_dense_if_slower()
        return Decision.from_plan(confirmed, decision.calibration, bool(decision.reused))
    return replace(decision, dense_ms=dense.milliseconds, latency_ms=pruned.milliseconds, speedup=1 / pruned.ratio)


__all__ = ["Comparison", "Row", "compare", "ensure_output_dir"]


class Comparison(NamedTuple):
    """A table with what is behind it.

    Attributes:
        rows: The variants, dense first.
        decisions: Pruned variant -> its schedule, plan and latency.
        seconds: What profiling, planning and the final timing of all variants took.
    """

    rows: list[Row]
    decisions: dict[str, Decision]
    seconds: float


class _Decided(EvaluationCallback):
    """Prunes a run by a decision."""

    def __init__(self, config: PruningConfig, decision: Decision) -> None:
        self.config, self.decision = config, decision
        self._handle: PatchHandle | None = None

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._handle is None and self.decision.prunes:
            path = self.config.module_path
            schedule = self.decision.deployable(find_vision_transformer(pl_module, path))
            self._handle = patch(pl_module, self.decision.reduction or self.config.reduction, schedule, target=path)

    def _figures(self) -> dict[str, float]:
        return self.decision.metrics()

    def _close(self, trainer: L.Trainer) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def compare(
    trainer: L.Trainer, model: L.LightningModule, config: PruningConfig, max_drop: float | None = None, **data: Any
) -> Comparison:
    """Validates the module dense and pruned, everything else alike.

    Args:
        trainer: Runs all validations; a `TokenPruning` among its callbacks is idle meanwhile.
        model: The module; dense again afterwards.
        config: Method, block and objective. Its objective is one variant; an accuracy budget is the other, unless
            the objective is one. If its schedule is given, that is the only pruned variant.
        max_drop: The budget: share of the dense proxy that may be lost; 0.005 if None.
        **data: `dataloaders` or `datamodule`, for `trainer.validate`.

    Raises:
        DataError: If there is nothing to validate on.
        ArgumentError: If `max_drop` is given although nothing is planned for it.
    """
    survey = Survey(config, _objectives(config, max_drop))
    recorder = OutcomeRecorder(config.module_path, config.images_from_batch)
    with command_run(trainer, config, survey, recorder):
        found = {"dense": trainer.validate(model, verbose=False, **data)}
        outcomes = {"dense": recorder.outcomes}
    if not survey.decisions:
        raise DataError("The validation loader yielded no batch to compare on.")
    for variant, decision in survey.decisions.items():
        with command_run(trainer, config, _Decided(config, decision), recorder):
            found[variant] = trainer.validate(model, verbose=False, **data)
            outcomes[variant] = recorder.outcomes
    rows = [_row(variant, survey, flat(metrics), outcomes) for variant, metrics in found.items()]
    return Comparison(rows, survey.decisions, survey.seconds)


def _objectives(config: PruningConfig, max_drop: float | None) -> dict[str, Objective]:
    name = config.label
    given = config.schedule != "auto"
    if max_drop is not None and (given or isinstance(config.goal, AccuracyBudget)):
        why = "the schedule is given" if given else f"the objective is {config.goal}"
        raise ArgumentError(f"`max_drop` plays no part where {why}; got max_drop={max_drop}.")
    if isinstance(config.goal, AccuracyBudget):
        return {f"{name} budget": config.goal}
    return {
        f"{name} {_kind(config.goal)}": config.goal,
        f"{name} budget": AccuracyBudget(0.005 if max_drop is None else max_drop),
    }


def _kind(objective: Objective) -> str:
    """What an objective is, in words: of `LatencyBudget` "latency budget"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(objective).__name__).lower()


def ensure_output_dir(output: str | Path) -> Path:
    """The output folder, made if need be, checked before hours of work rather than after.

    Raises:
        ArgumentError: If it cannot be made or written to.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ArgumentError(f"`output` must be a folder that can be written to, got {folder}: {error}") from error


def _row(variant: str, survey: Survey, metrics: dict[str, float], outcomes: dict[str, Outcomes | None]) -> Row:
    timing, decision = survey.timings[variant], survey.decisions.get(variant)
    any_decision = next(iter(survey.decisions.values()))
    figures: dict[str, Any] = timed(timing) | logged(metrics)
    if variant != "dense":
        figures |= compared(outcomes["dense"], outcomes[variant])
    return Row(
        variant=variant,
        method=decision.method if decision else "",
        block=" ".join(str(block) for block in decision.schedule.reducing) if decision else "",
        removed=decision.schedule.total_removed if decision else 0,
        tokens=decision.tokens if decision else any_decision.dense_tokens,
        **figures,
        **environment_columns(any_decision.context, survey.images),
    )
