"""Deciding all variants of a comparison at once, on the first batch of a validation run."""

from dataclasses import replace
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.decision import Decision, given_schedule, measure_given
from lightning_prune.callbacks.images import Calibration, images_from_batch
from lightning_prune.callbacks.planned import check_labels, planned_for, profiled, sample
from lightning_prune.callbacks.random_state import preserving_random_state
from lightning_prune.callbacks.together import decided_by_rank_zero, refuse_sharded
from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning import Objective, ProxyCurve
from lightning_prune.profiling import Timing, compare_latency
from lightning_prune.schedule import Schedule
from lightning_prune.shares import shares_of


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
        self.seconds = 0.0

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Decides, once."""
        if dataloader_idx:  # the table is of the first loader
            return
        count = len(images_from_batch(batch, self.pruner.images_from_batch))
        share = shares_of(trainer)[0]
        self.images += count if share is None else share.counted(batch_idx, count)
        if not self.timings:
            refuse_sharded(trainer)
            start = perf_counter()
            decided = decided_by_rank_zero(trainer, lambda: self._decide(trainer, pl_module, batch))
            self.decisions, self.timings = decided
            self.seconds = perf_counter() - start

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds up the images of all ranks."""
        count = torch.tensor(self.images, device=pl_module.device)
        self.images = int(trainer.strategy.reduce(count, reduce_op="sum"))

    def _decide(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any
    ) -> tuple[dict[str, Decision], dict[str, Timing]]:
        pruner = self.pruner
        pruner.compilation.begin(pruner, pl_module)
        images = images_from_batch(batch, pruner.images_from_batch)
        with preserving_random_state(), trainer.precision_plugin.forward_context():
            transformer = find_vision_transformer(pl_module, pruner.target)
            if pruner.schedule == "auto":
                calibration = sample(pruner, trainer, pl_module, batch)
                decisions = self._planned(pl_module, images, calibration)
            else:
                schedule = given_schedule(pruner.schedule, pruner.place, transformer, pruner.reduction, images)
                limit = pruner.max_seconds / 3
                given = measure_given(
                    pl_module, images, pruner.reduction, schedule, limit, pruner.target, progress=pruner.verbose
                )
                decisions = {f"{pruner.reduction.name} given": given}
            variants: dict[str, tuple[Any, Schedule] | None] = {"dense": None}
            variants |= {
                n: (d.reduction or pruner.reduction, d.schedule) for n, d in decisions.items() if d.schedule.total
            }
            timings = compare_latency(
                pl_module,
                images,
                variants,
                rounds=51,
                max_seconds=pruner.max_seconds,
                target=pruner.target,
                progress=pruner.verbose,
            )
        decisions = {name: _confirmed(decision, timings, name) for name, decision in decisions.items()}
        # A variant that removes nothing is the dense model: timing it again would only add noise.
        timings |= {name: timings["dense"] for name, decision in decisions.items() if not decision.schedule.total}
        return decisions, timings

    def _planned(self, pl_module: L.LightningModule, images: Tensor, calibration: Calibration) -> dict[str, Decision]:
        pruner, objectives = self.pruner, list(self.objectives.values())
        check_labels(pruner, calibration)
        found = profiled(pruner, pl_module, images)
        more: dict[str, Any] = {}
        if not pruner.searches:
            labels = calibration.labels if pruner.protocol == "paper" else None
            shared: dict[str, Any] = {"labels": labels, "target": pruner.target, "progress": pruner.verbose}
            curve = ProxyCurve(pl_module, calibration.images, found.profile, pruner.reduction, **shared)
            more = {"curve": curve, "confirm": False}
        decisions = planned_for(pruner, pl_module, images, calibration, objectives, found, **more)
        return dict(zip(self.objectives, decisions, strict=True))


def _confirmed(decision: Decision, timings: dict[str, Timing], name: str) -> Decision:
    """The decision with its latency from the run of all variants; one that is not faster there removes nothing."""
    if name not in timings:
        return replace(decision, dense_ms=timings["dense"].milliseconds, latency_ms=timings["dense"].milliseconds)
    dense, pruned = timings["dense"], timings[name]
    if decision.plan is not None:
        confirmed = replace(decision.plan, dense=dense, pruned=pruned).unless_slow()
        return Decision.from_plan(confirmed, decision.calibration, bool(decision.reused))
    return replace(decision, dense_ms=dense.milliseconds, latency_ms=pruned.milliseconds, speedup=1 / pruned.ratio)
