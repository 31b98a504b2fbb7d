"""`TokenPruning`, the callback that profiles, plans and patches in a Trainer's evaluation loops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from weakref import ReferenceType, ref

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune._utils.validation import check_bool
from lightning_prune.callbacks.compiled_run import CompiledRun
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.callbacks.decider import Decider
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import open_first_batch
from lightning_prune.callbacks.hooks import (
    EvaluationCallback,
    is_command_run,
    trainer_callbacks,
    unpatch_hyperparameters,
)
from lightning_prune.callbacks.pruned_run import PrunedRun
from lightning_prune.callbacks.run_agreement import join_agreements
from lightning_prune.errors import ArgumentError
from lightning_prune.patching.token_readers import RestoreMode
from lightning_prune.planning import Objective
from lightning_prune.profiling.measurement import ProfilingMode
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes.calibration import CALIBRATION_IMAGES
from lightning_prune.schedule import KeepRates, Schedule


class TokenPruning(EvaluationCallback):
    """Makes the Vision Transformer of a LightningModule faster on the trainer's device while it is evaluated.

    On the first batch of `trainer.validate`, `test` or `predict` it measures the model's latency against its number
    of tokens on the trainer's accelerator, at the loop's batch size and precision, estimates what each schedule costs
    in accuracy on a sample of the dataset, chooses one and patches the model; the run is pruned from that batch on.
    When the run ends, also by an exception, the model is bit-identical to before. In `trainer.fit` only validation is
    pruned: training, the sanity check and checkpoints stay dense. The callback moves to the front of the trainer's
    callbacks, so that the others see the model restored when a run ends or fails.

    What is measured is what runs. Before anything is measured, `forward` of the module runs up to the transformer, to
    see what it makes of the images of the batch (another size, precision or normalisation, further arguments). Then the
    first step is watched, also where it calls a method of the transformer such as `forward_features`, or its blocks: if
    it passes something else, the schedule is decided again with that in the time that is left, or a warning gives both
    figures. Measuring leaves no trace: the user's forward hooks are not called for it, which a warning says, since no
    figure includes what they do; buffers and random generators are put back.

    A later run keeps the schedule if it is of the same model under the same conditions (structure, kernels, batch,
    precision, versions). With other weights or images its accuracy is estimated again, and it is planned again if the
    objective does not tolerate it. A later validation of `fit` then plans on the latency profile of the first one, in a
    quarter of `time_limit` at most.

    Under DDP rank 0 decides and every rank gets the same schedule, or the same error, also a rank that gets no batch;
    a schedule that is decided again holds on all ranks from their second batch on. Strategies that shard the model are
    refused.

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
            begins with one, or a mapping with `image`, `images`, `pixel_values` or `inputs`. Where the step, and not
            `forward`, changes them or passes tensors along with them, return what the ViT receives.
        time_limit: Seconds in total for profiling, planning and timing in a run, also if it has to decide twice. If the
            time is short, fewer images and methods are used, and the best schedule that was timed is taken.
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
        clock: What latencies are timed by: `"wall"`, or `"cpu"`, the CPU time of this process, which repeats better on
            a busy machine, at one thread. On a CPU only. The time limit is wall time.
        seed: Of the calibration sample.
        verbose: Prints a panel with the decision, and progress: a bar on a terminal, else lines.
        tail: Whether a model that is pruned has the exact tail, as of `lightning_prune.patch`: by default where no
            output changes but by rounding. `protocol="paper"` has none.
        restore: How removed tokens are given back to a dense head, as of `lightning_prune.patch`. What is measured is
            then the outermost module around the transformer that has a `forward`: the LightningModule, if it has one,
            which is called with images and may return any tensors. The accuracy is estimated by their mean cosine
            similarity to those of the dense model.

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
        clock: str = "wall",
        seed: int = 0,
        verbose: bool = True,
        tail: bool | None = None,
        restore: RestoreMode | None = None,
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
            clock=clock,
            seed=seed,
            verbose=verbose,
            tail=tail,
            restore=restore,
        )
        self.enabled = enabled
        self._decider = Decider()
        self._compiled = CompiledRun()
        self._run: PrunedRun | None = None  # on ranks that have a batch
        self._running: ReferenceType[L.Trainer] | None = None  # whose run is pruned
        self._is_idle = False  # whether the run is that of a command
        self._is_decided = False

    @property
    def config(self) -> PruningConfig:
        """The settings."""
        return self._config

    @config.setter
    def config(self, config: PruningConfig) -> None:
        self._config = config
        self._decider.forget()

    @property
    def decision(self) -> Decision | None:
        """What was decided last."""
        return self._decider.decision

    def __getstate__(self) -> dict[str, Any]:
        """Without the current run: a copy decides again, for the model of its own runs."""
        return {**vars(self), "_run": None, "_running": None}

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
        if self._run is not None:
            unpatch_hyperparameters(checkpoint)

    def use(self, decision: Decision) -> None:
        """Makes the next runs use an earlier decision, without measuring again.

        Args:
            decision: Of this model, on this device, at this batch size and precision.
        """
        self._decider.give(decision)

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._is_idle or trainer.sanity_checking:
            return

        def calibration() -> Tensor:
            with open_first_batch(trainer, pl_module, batch, self._config) as first:
                return first.from_all_over(CALIBRATION_IMAGES)

        self._compiled.before_batch(self._config, pl_module, batch, batch_idx == 0, calibration)
        if not self.enabled:
            return
        if self._run is None:
            self._run = PrunedRun(self._config, self._decider)
            self._run.begin(trainer, pl_module, batch)
            self._running = ref(trainer)
        else:
            self._run.check(batch, batch_idx, dataloader_idx)

    def _after_batch(self) -> None:
        if self._run is not None:
            self._run.after_step()

    def _before_figures(self, trainer: L.Trainer) -> None:
        """Takes part in what the other ranks agree on, where this one had no batch."""
        if self._running is None and self.enabled and not (self._is_idle or trainer.sanity_checking):
            joined = join_agreements(trainer)
            if joined is not None:
                self._decider.decision, self._running = joined.decision, ref(trainer)

    def _figures(self) -> dict[str, float]:
        waits = self._run is not None and self._run.waits
        return self.decision.metrics() if self._running is not None and self.decision is not None and not waits else {}

    def _close(self, trainer: L.Trainer) -> None:
        if self._running is not None and self._running() not in (None, trainer):
            return  # a run of another Trainer, which was refused in `setup`
        self._compiled.end()
        if self._run is not None:
            self._is_decided = self._is_decided or not self._run.waits
            self._run.close()
        self._run, self._running = None, None


def config_of(trainer: L.Trainer) -> PruningConfig:
    """The config of the `TokenPruning` among a trainer's callbacks; the default one where there is none.

    Args:
        trainer: It is not changed.
    """
    pruners = [callback for callback in trainer_callbacks(trainer) if isinstance(callback, TokenPruning)]
    return pruners[0].config if pruners else PruningConfig()
