"""Dense against pruned on the same data, device and clock: the rows of one honest table."""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.attached import attached_callbacks
from lightning_prune.callbacks.decision import Decision, given_schedule, measure_given
from lightning_prune.callbacks.images import images_from_batch
from lightning_prune.callbacks.together import decided_by_rank_zero
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning import AccuracyBudget, Objective, ProxyCurve, plan
from lightning_prune.profiling import Timing, compare_latency, profile_latency
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class Row:
    """One variant of the table.

    Attributes:
        variant: Its name; `dense` is the unpruned model.
        method: The reduction; empty for dense.
        block: The reducing blocks; empty for dense.
        removed: R, tokens removed in all.
        tokens: Tokens that leave the last reducing block.
        top1: Share of images whose best class is right; None where the module does not log it.
        top5: Share of images with the right class among the best five.
        latency_ms: Median time of the transformer on one batch, from one interleaved run of all variants.
        latency_spread: Half the distance between the quartiles of those times.
        throughput: Images a second in forward during validation.
        throughput_end_to_end: Images a second of the whole loop, loading included.
        speedup: Dense latency over this one, the median over rounds in which both ran.
        images: Images validated.
        device: What it ran on.
        batch_size: Images in a batch.
        precision: Of the computation.
    """

    variant: str
    method: str
    block: str
    removed: int
    tokens: int
    top1: float | None
    top5: float | None
    latency_ms: float
    latency_spread: float
    throughput: float | None
    throughput_end_to_end: float | None
    speedup: float
    images: int
    device: str
    batch_size: int
    precision: str

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, in the order of the columns."""
        return asdict(self)


class Survey(L.Callback):
    """Decides every variant on the first batch of a dense validation run, and counts the images of the run.

    One latency profile and one accuracy curve serve all objectives, and all variants are timed in one interleaved run.

    Args:
        pruner: Whose settings the variants share.
        objectives: Name of a variant -> what it optimises.
    """

    def __init__(self, pruner: TokenPruning, objectives: dict[str, Objective]) -> None:
        self.pruner, self.objectives = pruner, objectives
        self.decisions: dict[str, Decision] = {}
        self.timings: dict[str, Timing] = {}
        self.images = 0

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Decides, once."""
        self.images += len(images_from_batch(batch, self.pruner.images_from_batch))
        if not self.timings:
            decided = decided_by_rank_zero(trainer, lambda: self._decide(trainer, pl_module, batch))
            self.decisions, self.timings = decided

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds up the images of all ranks."""
        count = torch.tensor(self.images, device=pl_module.device)
        self.images = int(trainer.strategy.reduce(count, reduce_op="sum"))

    def _decide(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any
    ) -> tuple[dict[str, Decision], dict[str, Timing]]:
        pruner = self.pruner
        images = images_from_batch(batch, pruner.images_from_batch)
        with isolate_rng(), trainer.precision_plugin.forward_context():
            transformer = find_vision_transformer(pl_module, pruner.target)
            if pruner.schedule == "auto":
                decisions = self._planned(pl_module, images, pruner.sample(trainer, pl_module, batch))
            else:
                schedule = given_schedule(pruner.schedule, pruner.block, transformer.depth)
                limit = pruner.max_seconds / 3
                given = measure_given(
                    pl_module, images, pruner.reduction, schedule, limit, pruner.target, progress=pruner.verbose
                )
                decisions = {f"{pruner.reduction.name} given": given}
            variants: dict[str, tuple[Any, Schedule] | None] = {"dense": None}
            variants |= {n: (pruner.reduction, d.schedule) for n, d in decisions.items() if d.schedule.total}
            timings = compare_latency(
                pl_module,
                images,
                variants,
                rounds=51,
                max_seconds=pruner.max_seconds,
                target=pruner.target,
                progress=pruner.verbose,
            )
        # A variant that removes nothing is the dense model: timing it again would only add noise.
        timings = {name: timings.get(name, timings["dense"]) for name in ("dense", *decisions)}
        return {name: _timed(decision, name, timings) for name, decision in decisions.items()}, timings

    def _planned(self, pl_module: L.LightningModule, images: Any, calibration: Any) -> dict[str, Decision]:
        pruner = self.pruner
        shared: dict[str, Any] = {
            "method": pruner.reduction,
            "block": pruner.block,
            "protocol": pruner.protocol,
            "target": pruner.target,
            "progress": pruner.verbose,
        }
        limit = None if pruner.protocol == "paper" else pruner.max_seconds
        profile = profile_latency(pl_module, images, max_seconds=limit, **shared)
        labels = calibration.labels if pruner.protocol == "paper" else None
        curve = ProxyCurve(
            pl_module,
            calibration.images,
            profile,
            pruner.reduction,
            labels=labels,
            target=pruner.target,
            progress=pruner.verbose,
        )
        return {
            name: Decision.from_plan(
                plan(
                    pl_module,
                    calibration.images,
                    profile=profile,
                    curve=curve,
                    labels=labels,
                    objective=objective,
                    confirm=False,
                    max_seconds=pruner.max_seconds,
                    **shared,
                ),
                calibration.source,
            )
            for name, objective in self.objectives.items()
        }


def compare(
    trainer: L.Trainer, model: L.LightningModule, pruner: TokenPruning, max_drop: float, **data: Any
) -> tuple[list[Row], dict[str, Decision]]:
    """Validates the module dense and pruned, everything else alike.

    Args:
        trainer: Runs all validations; `pruner` must be among its callbacks.
        model: The module; dense again afterwards.
        pruner: Method, block and objective. Its objective is one variant; an accuracy budget is the other, unless
            the objective is one. If its schedule is given, that is the only pruned variant.
        max_drop: The budget: share of the dense proxy that may be lost.
        **data: `dataloaders` or `datamodule`, for `trainer.validate`.

    Returns:
        The rows, dense first, and the decision behind each pruned one.

    Raises:
        DataError: If there is nothing to validate on.
    """
    name = pruner.reduction.name
    if isinstance(pruner.objective, AccuracyBudget):
        objectives: dict[str, Objective] = {f"{name} budget": pruner.objective}
    else:
        objectives = {f"{name} utility": pruner.objective, f"{name} budget": AccuracyBudget(max_drop)}
    survey = Survey(pruner, objectives)
    settings = pruner.enabled, pruner.verbose, pruner.schedule
    callbacks = attached_callbacks(trainer)
    callbacks.append(survey)
    try:
        pruner.enabled = False
        found = {"dense": trainer.validate(model, verbose=False, **data)}
        callbacks.remove(survey)
        if not survey.decisions:
            raise DataError("The validation loader yielded no batch to compare on.")
        pruner.enabled, pruner.verbose = True, False
        for variant, decision in survey.decisions.items():
            pruner.use(decision)
            found[variant] = trainer.validate(model, verbose=False, **data)
    finally:
        if survey in callbacks:
            callbacks.remove(survey)
        pruner.enabled, pruner.verbose, pruner.schedule = settings
        pruner.decision = None
    rows = [_row(variant, survey, _flat(metrics)) for variant, metrics in found.items()]
    return rows, survey.decisions


def writable(output: str | Path) -> Path:
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


def _timed(decision: Decision, name: str, timings: dict[str, Timing]) -> Decision:
    dense, pruned = timings["dense"], timings[name]
    return replace(decision, dense_ms=dense.milliseconds, latency_ms=pruned.milliseconds, speedup=1 / pruned.ratio)


def _flat(metrics: Any) -> dict[str, float]:
    """Of several dataloaders the first counts."""
    return dict(metrics[0]) if metrics else {}


def _row(variant: str, survey: Survey, metrics: dict[str, float]) -> Row:
    timing, decision = survey.timings[variant], survey.decisions.get(variant)
    any_decision = next(iter(survey.decisions.values()))
    context = any_decision.context
    return Row(
        variant=variant,
        method=decision.method if decision else "",
        block=" ".join(str(block) for block in decision.schedule.reducing) if decision else "",
        removed=decision.schedule.total if decision else 0,
        tokens=decision.tokens if decision else any_decision.dense_tokens,
        top1=metrics.get("val/top1"),
        top5=metrics.get("val/top5"),
        latency_ms=timing.milliseconds,
        latency_spread=timing.spread,
        throughput=metrics.get("val/throughput"),
        throughput_end_to_end=metrics.get("val/throughput_end_to_end"),
        speedup=1 / timing.ratio,
        images=survey.images,
        device=context["device"],
        batch_size=context["batch_size"],
        precision=context["precision"],
    )
