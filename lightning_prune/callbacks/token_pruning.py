"""`TokenPruning`, the callback that profiles, plans and patches in a Trainer's evaluation loops."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal
from weakref import ReferenceType, ref

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune._utils.random_state import preserve_random_state
from lightning_prune._utils.validation import check_bool
from lightning_prune.callbacks.batches import BatchShape, batch_shape
from lightning_prune.callbacks.compiled_run import CompiledRun, is_wrapped_by_compile, warn_if_wrapped_by_compile
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.decision_panel import print_decision
from lightning_prune.callbacks.decision_reuse import DecisionConditions, checked_anew
from lightning_prune.callbacks.first_batch import FirstBatch, can_run, open_first_batch
from lightning_prune.callbacks.first_call import FirstCall, watch_first_call
from lightning_prune.callbacks.given_schedule import time_adaptive, time_given
from lightning_prune.callbacks.hooks import (
    EvaluationCallback,
    is_command_run,
    trainer_callbacks,
    unpatch_hyperparameters,
)
from lightning_prune.callbacks.planned_schedule import planned
from lightning_prune.callbacks.rank_agreement import join_decision, on_rank_zero
from lightning_prune.errors import ArgumentError, DataError, UnsupportedModelError
from lightning_prune.patching import PatchHandle
from lightning_prune.patching.models.base import calling_with
from lightning_prune.planning import Objective
from lightning_prune.profiling.measurement import ProfilingMode, check_dense
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import KeepRates, Schedule


class TokenPruning(EvaluationCallback):
    """Makes the Vision Transformer of a LightningModule faster on the trainer's device while it is evaluated.

    On the first batch of `trainer.validate`, `test` or `predict` it measures the model's latency against its number
    of tokens on the trainer's accelerator, at the loop's batch size and precision, estimates what each schedule costs
    in accuracy on a sample of the dataset, chooses one and patches the model; the run is pruned from that batch on.
    When the run ends, also by an exception, the model is bit-identical to before. In `trainer.fit` only validation is
    pruned: training, the sanity check and checkpoints stay dense. The callback moves to the front of the trainer's
    callbacks, so that the others see the model restored when a run ends or fails.

    What is measured is what runs. If the step passes something else to the transformer than the images of the batch (it
    resizes or normalises them, casts them, uses an autocast or further arguments), the schedule is decided anew with
    that. Measuring leaves no trace: the user's forward hooks are not called for it, which a warning says, since no
    figure includes what they do; buffers and random generators are put back.

    A later run keeps the schedule if it is of the same model under the same conditions (structure, kernels, batch,
    precision, versions). With other weights or images its accuracy is estimated again, and it is planned anew if the
    objective does not tolerate it.

    Under DDP rank 0 decides and every rank gets the same schedule, or the same error, also a rank that gets no batch;
    strategies that shard the model are refused.

    `pruning/latency_ms`, `pruning/dense_latency_ms`, `pruning/speedup`, `pruning/tokens` and `pruning/removed` go to
    the trainer's loggers and `callback_metrics` (in `predict`, which has no metrics, to the loggers).

    Args:
        method: `"auto"` searches several methods over all blocks. Or the name of one, or a
            `lightning_prune.reduction.Reduction`. With one that lets the images decide how many tokens are removed,
            such as `VWTInter`, nothing is planned: it is applied, and timed against dense.
        schedule: `"auto"` plans one. A `Schedule`, `KeepRates`, a `Plan` or the path of a saved one is used as it is; a
            list has one number for each block; R removes R tokens in all and 0.7 keeps 70% of the patch tokens, in the
            usual form of the method: at `block`, or spread over the blocks. A schedule that names its method, or one
            for each block, is run with these; what names none is ToMe's unless `method` is given. A given schedule is
            timed against dense, and `objective`, `calibration` and `protocol` have no effect. Where images come in
            several sizes, a planned schedule and keep rates hold for all; counts hold for the first only.
        objective: What to optimise; `AccuracyBudget(0.005)` if None. The POMT paper's computation is
            `TokenPruning(method="pomt", objective=Utility(0.5))`.
        block: The reducing block of a given method: an index, or a fraction of the depth (0.25 is the POMT paper's);
            `"auto"` searches which blocks reduce, and by how much.
        calibration: How many images to sample from the dataset (at least 1024 for `protocol="paper"`), or the images
            (images, C, H, W), or a loader. No more are sampled than a run with limited batches reads, and none after
            a quarter of the time limit. Where the dataset cannot be sampled (an IterableDataset, a loader of
            another kind, a sampler that may skip items) the first batch is used unless images or a loader are given.
        images_from_batch: A function from a batch to its images, where a batch is not a tensor, a sequence that
            begins with one, or a mapping with `image`, `images`, `pixel_values` or `inputs`. With several processes, or
            where the step passes tensors along with the images, return what the ViT receives.
        time_limit: Seconds in total for profiling, planning and timing. If the time is short, fewer images and methods
            are used, and the best schedule that was timed is taken.
        module_path: Dotted path of the transformer in the LightningModule, where there are several.
        enabled: False leaves every run dense; can be changed between runs.
        proxy: What the accuracy is estimated by: `"soft_agreement"` for classes, `"tag_agreement"` for independent
            tags, `"r2"` for numbers, `"cosine"` for features. `"auto"` chooses by the outputs, the targets in the
            batches, and the losses and metrics of the module.
        protocol: `"paper"` profiles and estimates as POMT does; needs labels in the batches and hours on a CPU.
        use_cache: False neither reads nor keeps latency profiles and estimates of accuracy of other runs.
        cache_dir: Folder of what is kept; None for the user's cache folder (see
            `lightning_prune.profiling.ProfileStore`).
        runtime: What runs the model: `"torch"` as it is, or `"torch.compile"`, also with a mode of torch as in
            `"torch.compile:mode=reduce-overhead"`, or `"torch.compile:mode=blocks"`, which compiles each block by
            itself in a fraction of the time. It holds while a run lasts, dense or pruned, and for what is measured.
            Each token count takes seconds to compile: raise `time_limit`. Short last batches run eagerly.
        seed: Of the calibration sample.
        verbose: Prints a panel with the decision, and progress on a terminal.

    Attributes:
        config: The settings. Frozen; assign another one, as in `pruner.config = replace(pruner.config, seed=1)`, and
            the next run decides again.
        decision: What was decided last: schedule, latencies, reason, and the whole plan.

    Raises:
        ArgumentError: If an argument is unusable; some can only be checked when a run starts.
        UnsupportedModelError: In a run, if the module holds no Vision Transformer that can be pruned, or a strategy
            shards it.

    Example:
        >>> import lightning as L
        >>> from lightning_prune import ImageClassifier
        >>> from lightning_prune.callbacks import TokenPruning
        >>> trainer = L.Trainer(callbacks=[TokenPruning()], logger=False)
        >>> # trainer.validate(module, datamodule=data)
    """

    def __init__(
        self,
        method: Reduction | str = "auto",
        schedule: Literal["auto"] | int | float | list[int] | str | Path | Schedule | KeepRates = "auto",
        objective: Objective | None = None,
        block: int | float | Literal["auto"] = 0.25,
        calibration: Any = 512,
        images_from_batch: Callable[[Any], Tensor] | None = None,
        time_limit: float = 60.0,
        module_path: str | None = None,
        enabled: bool = True,
        proxy: str = "auto",
        protocol: ProfilingMode = "deployed",
        use_cache: bool = True,
        cache_dir: str | Path | None = None,
        runtime: str = "torch",
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        check_bool("enabled", enabled)
        self._config = PruningConfig(
            method=method,
            schedule=schedule,
            objective=objective,
            block=block,
            calibration=calibration,
            images_from_batch=images_from_batch,
            time_limit=time_limit,
            module_path=module_path,
            proxy=proxy,
            protocol=protocol,
            use_cache=use_cache,
            cache_dir=cache_dir,
            runtime=runtime,
            seed=seed,
            verbose=verbose,
        )
        self.enabled = enabled
        self.decision: Decision | None = None
        self._decided_for: DecisionConditions | None = None  # None: `decision` holds for no run
        self._is_fixed = False  # whether `decision` was given by `use`, and holds for all runs
        self._compiled = CompiledRun()
        self._handle: PatchHandle | None = None
        self._shape: BatchShape | None = None  # of the run's first batch; None where unknown, or after a warning
        self._running: ReferenceType[L.Trainer] | None = None  # whose run is pruned
        self._is_idle = False  # whether the run is that of a command
        self._is_decided = False
        self._waits = False  # until the step calls the transformer
        self._end_watch: Callable[[], None] | None = None  # of the first call of the transformer in a run
        self._call_differs = False  # whether steps were seen to pass something else than the images of the batch

    @property
    def config(self) -> PruningConfig:
        """The settings."""
        return self._config

    @config.setter
    def config(self, config: PruningConfig) -> None:
        self._config, self._decided_for, self._is_fixed, self._call_differs = config, None, False, False

    def __getstate__(self) -> dict[str, Any]:
        """Without the current run and the measured model: a copy decides again, for the model of its own runs."""
        return {
            **vars(self),
            "_handle": None,
            "_shape": None,
            "_running": None,
            "_decided_for": None,
            "_end_watch": None,
        }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Called when a run begins. Refuses a second pruner, and moves this one to the front."""
        callbacks = trainer_callbacks(trainer)
        pruners = [callback for callback in callbacks if isinstance(callback, TokenPruning)]
        if len(pruners) > 1:
            raise ArgumentError(f"A Trainer can have one TokenPruning callback, got {len(pruners)}.")
        other = self._running() if self._running is not None else None
        if other not in (None, trainer):
            raise ArgumentError("This TokenPruning is in use in a run of another Trainer; use one for each Trainer.")
        self._is_idle = is_command_run(trainer)
        if not self._is_idle:
            # First, because Lightning stops at the first callback whose on_exception fails and calls no other hook.
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        self._is_decided = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Called when a run ends. Restores the model if that was not done; warns where there was nothing to prune."""
        super().teardown(trainer, pl_module, stage)
        if self.enabled and stage != "fit" and not self._is_decided and not self._is_idle:
            rank_zero_warn(
                "TokenPruning measured nothing and pruned nothing: there was no batch, or no step called the Vision "
                "Transformer."
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is saved, perhaps during a validation. Keeps the patch out of it."""
        if self._handle is not None:
            unpatch_hyperparameters(checkpoint)

    def use(self, decision: Decision) -> None:
        """Makes the next runs use an earlier decision, without measuring again.

        Args:
            decision: Of this model, on this device, at this batch size and precision.
        """
        self.decision, self._is_fixed = decision, True

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._is_idle or trainer.sanity_checking:
            return
        self._compiled.before_batch(self._config, pl_module, batch, first=batch_idx == 0)
        if not self.enabled:
            return
        if self._running is None:
            self._open(trainer, pl_module, batch)
        elif self._handle is not None and not self._handle.active:
            raise UnsupportedModelError(
                f"The patch of this run was removed or replaced before batch {batch_idx}; leave it in place until the "
                "run ends."
            )
        elif self._shape is not None and dataloader_idx == 0:
            self._check_shape(self._shape, batch, batch_idx)

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        with open_first_batch(trainer, pl_module, batch, self.config) as first:
            self._waits = self._has_to_wait(first)
            if not self._waits:
                self._decide_and_patch(first)
                self._shape = batch_shape(batch, self.config.images_from_batch)
        self._running = ref(trainer)
        # Only rank 0 measures.
        if trainer.is_global_zero and not is_wrapped_by_compile(pl_module, first.transformer):
            # A copy, since the step may change the images in place.
            loaded = None if self._is_fixed else first.images.clone()
            self._end_watch = watch_first_call(first.transformer, partial(self._check_call, first, loaded))

    def _has_to_wait(self, first: FirstBatch) -> bool:
        """Whether to decide when the step calls the transformer, since the images of the batch are not what it gets.

        Ranks would have to agree on it, so with several processes the images of the batch are measured in any case.
        """
        if first.trainer.world_size > 1 or self._is_fixed or is_wrapped_by_compile(first.module, first.transformer):
            return False
        return self._call_differs or (self._decided_for is None and not can_run(first))

    def _decide_and_patch(self, first: FirstBatch) -> None:
        self.decision = on_rank_zero(first.trainer, lambda: self._decide(first))
        self._is_decided = True
        if self.decision is not None and self.decision.prunes:
            schedule = self.decision.deployable(first.transformer)
            self._handle = PatchHandle(first.transformer, self.decision.reduction, schedule)

    def _check_call(self, first: FirstBatch, loaded: Tensor | None, call: FirstCall) -> None:
        """Decides anew where the step passes something else to the transformer than what was measured."""
        self._end_watch = None  # which holds the batch
        if not self._waits:
            differences = [] if self.decision is None else call.differences(self.decision.context, loaded)
            if not differences:
                return
            text = f"The step passes {', '.join(differences)} to the Vision Transformer"
            if self._is_fixed or first.trainer.world_size > 1 or not call.is_repeatable:
                rank_zero_warn(
                    f"{text}: the schedule and its latency are for what was measured. `images_from_batch` can return "
                    "what the transformer receives."
                )
                return
            rank_zero_warn(f"{text}: it is measured again with that, and the schedule is decided anew.")
            self._decided_for = None
        self._call_differs, self._waits, self._shape = True, False, None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        with preserve_random_state(), calling_with(first.transformer.root, call.keywords):
            call = replace(call, loaded=loaded)
            self._decide_and_patch(FirstBatch(first.trainer, first.module, first.batch, first.config, call))

    def _decide(self, first: FirstBatch) -> Decision | None:
        """The decision of an earlier run if it holds for this one, else a new one.

        None in training where none can be made, as for outputs that are not finite: that ends no training.
        """
        start = perf_counter()
        check_dense(first.transformer)  # also if nothing is measured: a patch of the user would be replaced
        if self.decision is not None and self._is_fixed:
            return self.decision
        conditions = DecisionConditions.of(first)
        earlier = self._reused(first, conditions)
        if earlier is not None:
            self._decided_for = conditions
            return earlier
        warn_if_wrapped_by_compile(first.module, first.transformer)
        try:
            decision = replace(self._decide_anew(first), seconds=perf_counter() - start)
        except DataError as error:
            if first.trainer.state.fn != "fit":
                raise
            rank_zero_warn(f"This validation is dense, as no schedule can be decided: {error}")
            return None
        self._decided_for = conditions
        self._report(decision)
        return decision

    def _reused(self, first: FirstBatch, conditions: DecisionConditions) -> Decision | None:
        """The decision of an earlier run, if it holds for this one."""
        earlier, known = self.decision, self._decided_for
        if earlier is None or known is None or not known.same_latency(conditions):
            return None
        return earlier if known.accuracy == conditions.accuracy else checked_anew(first, earlier)

    def _decide_anew(self, first: FirstBatch) -> Decision:
        """Plans a schedule, or times what was given, against the dense model."""
        config = self._config
        if not config.is_planned:
            return time_adaptive(first) if config.is_adaptive else time_given(first)
        if config.verbose and config.protocol == "deployed":
            print(f"Planning a schedule for this device and batch takes up to {config.time_limit:g} s (`time_limit`).")
        return planned(first)

    def _check_shape(self, measured: BatchShape, batch: Any, batch_idx: int) -> None:
        shape = batch_shape(batch, self._config.images_from_batch)
        if shape is None or shape == measured:
            return
        rank_zero_warn(
            f"Batch {batch_idx} {measured.difference(shape)}. Pruning goes on, but its measured latency is for that "
            "size."
        )
        self._shape = None

    def _before_figures(self, trainer: L.Trainer) -> None:
        """Takes part in the decision of the other ranks, where this one had no batch."""
        if self._running is None and self.enabled and not (self._is_idle or trainer.sanity_checking):
            joined: Decision | None = join_decision(trainer)
            if joined is not None:
                self.decision, self._running = joined, ref(trainer)

    def _figures(self) -> dict[str, float]:
        is_known = self._running is not None and self.decision is not None and not self._waits
        return self.decision.metrics() if is_known and self.decision is not None else {}

    def _report(self, decision: Decision) -> None:
        for difference in decision.differences:
            rank_zero_warn(f"The schedule was made elsewhere: {difference}.")
        if self.config.verbose:
            print_decision(decision)

    def _close(self, trainer: L.Trainer) -> None:
        if self._running is not None and self._running() not in (None, trainer):
            return  # a run of another Trainer, which was refused in `setup`
        self._compiled.end()
        if self._end_watch is not None:
            self._end_watch()
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._shape, self._running, self._end_watch = None, None, None, None


def config_of(trainer: L.Trainer) -> PruningConfig:
    """The config of the `TokenPruning` among a trainer's callbacks; the default one where there is none.

    Args:
        trainer: It is not changed.
    """
    pruners = [callback for callback in trainer_callbacks(trainer) if isinstance(callback, TokenPruning)]
    return pruners[0].config if pruners else PruningConfig()
