"""Keeping a patch out of checkpoints that are written while it lasts."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal
from weakref import ReferenceType, ref

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune._utils.device import preserve_random_state
from lightning_prune.callbacks.batches import BatchShape, batch_shape, images_from_batch
from lightning_prune.callbacks.compiled_run import Compilation
from lightning_prune.callbacks.config import (
    MethodChoice,
    Refreshing,
    check_arguments,
    check_together,
    readable_schedule,
)
from lightning_prune.callbacks.decision import (
    Decision,
    given_schedule,
    measure_adaptive,
    measure_given,
    planned,
    sample,
    warn_if_wrapped_by_compile,
)
from lightning_prune.callbacks.distributed import decided_by_rank_zero, refuse_sharded
from lightning_prune.callbacks.hooks import EvaluationCallback, trainer_callbacks
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import PatchHandle, VisionTransformer, find_vision_transformer, patch, unpatch
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.planning import Objective, Utility
from lightning_prune.profiling import measurement_context
from lightning_prune.profiling.measurement import Protocol, check_dense
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.runtimes.compilation import Mode, parse_compile_mode
from lightning_prune.schedule import KeepRates, Schedule


def make_dense(checkpoint: dict[str, Any]) -> None:
    """Puts unpatched copies in the place of patched modules among the hyperparameters of a checkpoint.

    Weights have no patch on them, but a module that was passed to a LightningModule may be one of its hyperparameters,
    and is pickled as it is.

    Args:
        checkpoint: As Lightning hands it to `on_save_checkpoint`; changed in place.
    """
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        for name, value in dict(checkpoint.get(key, {})).items():
            if any(map(_patched, tree_leaves(value))):
                checkpoint[key][name] = dense = copy.deepcopy(value)
                for leaf in filter(_patched, tree_leaves(dense)):
                    unpatch(leaf)


def _patched(value: Any) -> bool:
    return isinstance(value, nn.Module) and any(is_patched_module(module) for module in value.modules())


class TokenPruning(MethodChoice, Refreshing, EvaluationCallback):
    """Makes the Vision Transformer of a LightningModule faster on the trainer's device while it is evaluated.

    On the first batch of `trainer.validate`, `test` or `predict` it measures the model's latency against its token
    count on the trainer's accelerator, at the loop's batch size and precision, estimates what each cut costs in
    accuracy on a sample of the dataset, chooses a schedule and patches the model; the run is pruned from that batch
    on. When the run ends, by whatever cause, the model is bit-identical to before. In `trainer.fit` only validation
    is pruned: training, the sanity check and checkpoints stay dense. The profile is made once and kept. The callback
    moves to the front of the trainer's own, so that the others see the model restored when a run ends or fails.

    Under DDP rank 0 decides and every rank gets the same schedule, or the same error; strategies that spread the
    model over processes are refused.

    `pruning/latency_ms`, `pruning/dense_latency_ms`, `pruning/speedup`, `pruning/tokens` and `pruning/removed` go to
    the trainer's loggers and `callback_metrics` (in `predict`, which has no metrics, to the loggers).

    Args:
        method: Name of the reduction, or a `lightning_prune.reduction.Reduction`. With one that lets the images decide
            how many tokens go, as `VWTInter`, nothing is planned: it is applied, and timed beside dense. `"auto"`
            searches several methods, over all blocks, and `block` is left out; see
            `lightning_prune.planning.plan_blocks`.
        schedule: `"auto"` plans one; R removes so many tokens at `block`, and 0.7 keeps so many of its patch tokens; a
            list has one number a block; a `Schedule`, `KeepRates` or the path of saved ones is used as it is, and timed
            beside dense. With a given schedule `objective`, `alpha`, `calibration` and `protocol` play no part. Where
            images come in several sizes, a planned schedule and keep rates hold for all; counts for the first only.
        objective: What to optimise; `Utility(alpha)` if None.
        block: The reducing block: an index, or a fraction of the depth (0.25 is the POMT paper's); `"auto"` searches
            over which blocks reduce, and by how much.
        alpha: Weight of latency against accuracy where `objective` is None, in [0, 1].
        calibration: How many images to sample from the dataset (at least 1024 for `protocol="paper"`), or the images
            (images, channels, height, width), or a loader. Where the dataset cannot be sampled (an IterableDataset, a
            loader of another kind, a sampler that may pass over items) the first batch serves unless images or a
            loader are given.
        images_from_batch: A function from a batch to its images, where a batch is not a tensor, a sequence that
            begins with one, or a mapping with `image`, `images`, `pixel_values` or `inputs`. Return what the ViT
            receives: where the module resizes or normalises in its step, do so here too.
        time_limit: Time limit of latency profiling, and again of the accuracy estimate, which runs the dense model
            and four counts over the calibration images all the same.
        target: Dotted path of the transformer in the LightningModule, where there are several.
        enabled: False leaves every run dense; can be changed between runs.
        protocol: `"paper"` profiles and estimates as POMT does; needs labels in the batches and hours on a CPU.
        cache_dir: Where latency profiles are kept, to be reused in later runs: a folder, `"auto"` for the user's cache
            (see `lightning_prune.profiling.ProfileStore`), or None to keep none.
        refresh: Measures latency anew even where a profile is kept; set between runs, it makes the next decide anew.
        compile: Runs the transformer through `torch.compile` while a run lasts, dense or pruned, and profiles and plans
            it so: True, a mode (`"reduce-overhead"` for CUDA graphs), or `"blocks"`, block by block, in a fraction of
            the time. A token count is compiled for seconds: raise `time_limit`. Short last batches run eagerly.
        seed: Of the calibration sample.
        verbose: Prints a panel with what was decided, and progress on a terminal.

    Attributes:
        decision: What was decided last: schedule, latencies, reason, and the whole plan.

    Raises:
        ArgumentError: If an argument is unusable; some are only known to be when a run starts.
        UnsupportedModelError: In a run, if the module holds no Vision Transformer that can be pruned, or a strategy
            spreads it over processes.

    Example:
        >>> import lightning as L
        >>> from lightning_prune import ImageClassifier
        >>> from lightning_prune.callbacks import TokenPruning
        >>> trainer = L.Trainer(callbacks=[TokenPruning()], logger=False)
        >>> # trainer.validate(module, datamodule=data)
    """

    def __init__(
        self,
        method: str | Reduction = "pomt",
        schedule: Literal["auto"] | int | float | list[int] | str | Path | Schedule | KeepRates = "auto",
        objective: Objective | None = None,
        block: int | float | Literal["auto"] = 0.25,
        alpha: float = 0.5,
        calibration: Any = 512,
        images_from_batch: Callable[[Any], Tensor] | None = None,
        time_limit: float = 30.0,
        target: str | None = None,
        enabled: bool = True,
        protocol: Protocol = "deployed",
        cache_dir: Literal["auto"] | str | Path | None = "auto",
        refresh: bool = False,
        compile: bool | Mode = False,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        check_arguments(
            objective=objective,
            block=block,
            calibration=calibration,
            time_limit=time_limit,
            target=target,
            protocol=protocol,
            cache_dir=cache_dir,
            enabled=enabled,
            refresh=refresh,
            verbose=verbose,
            seed=seed,
        )
        self._reduction = None if method == "auto" else resolve(method)
        self.objective = objective if objective is not None else Utility(alpha)
        self.schedule = readable_schedule(schedule)
        self.block = block
        check_together(self._reduction, block, schedule, objective, alpha, protocol)
        self.calibration = calibration
        self.images_from_batch = images_from_batch
        self.time_limit = time_limit
        self.target = target
        self.enabled = enabled
        self.protocol = protocol
        self.cache_dir = cache_dir
        self.refresh = refresh
        self.seed = seed
        self.verbose = verbose
        self.decision: Decision | None = None
        self.compilation = Compilation(parse_compile_mode(compile))
        self._made_with: tuple[Any, ...] | None = None
        self._handle: PatchHandle | None = None
        self._form: BatchShape | None = (
            None  # of the first batch of the running loop; None where unknown, or told before
        )
        self._running: ReferenceType[L.Trainer] | None = None  # whose run is pruned
        self._met_batch = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the run under way and the model that was measured: a copy decides anew, for the model it meets."""
        idle = {"_handle": None, "_form": None, "_running": None}
        return {**vars(self), **idle, "_made_with": None if self._made_with is None else ()}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a second pruner: which of two patches is in force would depend on their order."""
        callbacks = trainer_callbacks(trainer)
        pruners = [callback for callback in callbacks if isinstance(callback, TokenPruning)]
        if len(pruners) > 1:
            raise ArgumentError(f"A Trainer can have one TokenPruning callback, got {len(pruners)}.")
        other = self._running() if self._running is not None else None
        if other not in (None, trainer):
            raise ArgumentError("This TokenPruning is at work in the run of another Trainer; give each its own.")
        # First, because Lightning stops at the first callback whose on_exception fails, and calls no other hook then.
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        self._met_batch = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restores the model, if nothing has before, and says so where there was nothing to prune."""
        super().teardown(trainer, pl_module, stage)
        if self.enabled and stage != "fit" and not self._met_batch:
            rank_zero_warn("TokenPruning saw no batch: nothing was measured and nothing pruned.")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the patch out of a checkpoint that is written in the middle of a validation."""
        if self._handle is not None:
            make_dense(checkpoint)

    def use(self, decision: Decision) -> None:
        """Makes the next runs use what was decided before, without measuring again.

        Args:
            decision: Of this model, on this device, at this batch size and precision.
        """
        self.schedule, self.decision, self._made_with = decision.schedule, decision, None  # None: holds for any run
        self._due = False

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if trainer.sanity_checking:
            return
        self.compilation.before_batch(self, pl_module, batch, first=batch_idx == 0)
        if not self.enabled:
            return
        if self._running is None:
            self._open(trainer, pl_module, batch)
        elif self._handle is not None and not self._handle.active:
            raise UnsupportedModelError(
                f"The patch of this run was taken off or replaced before batch {batch_idx}; leave it in place until "
                "the run ends."
            )
        elif dataloader_idx == 0:
            self._check_form(batch, batch_idx)

    def _after_batch(self) -> None:
        self.compilation.after_batch()

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        self._met_batch = True
        refuse_sharded(trainer)
        self.decision = decided_by_rank_zero(trainer, lambda: self._decide(trainer, pl_module, batch))
        self._form, self._running = batch_shape(batch, self.images_from_batch), ref(trainer)
        if self.decision.prunes:
            schedule = self.decision.deployable(find_vision_transformer(pl_module, self.target))
            reduction = self.decision.reduction or self.reduction
            self._handle = patch(pl_module, reduction, schedule, target=self.target)

    def _decide(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Decision:
        start = perf_counter()
        with preserve_random_state(), trainer.precision_plugin.forward_context():
            images = images_from_batch(batch, self.images_from_batch)
            transformer = find_vision_transformer(pl_module, self.target)
            check_dense(transformer)  # also where nothing is measured: the patch of the user would be replaced
            made_with = self._depends_on(transformer, measurement_context(transformer.runner, images))
            if self.decision is not None and self._made_with in (None, made_with) and not self._due:
                return self.decision
            warn_if_wrapped_by_compile(pl_module)
            if self._reduction is not None and self._reduction.adaptive:
                limit = self.time_limit / 3
                decision = measure_adaptive(pl_module, images, self._reduction, limit, self.target, self.verbose)
            elif self.schedule == "auto":
                calibration = sample(self, trainer, pl_module, batch)
                decision = planned(self, pl_module, images, calibration)
            else:
                schedule = given_schedule(self.schedule, self.place, transformer, self.reduction, images)
                limit = self.time_limit / 3
                decision = measure_given(
                    pl_module, images, self.reduction, schedule, limit, self.target, progress=self.verbose
                )
        decision = replace(decision, seconds=perf_counter() - start)
        self._made_with, self._due = made_with, False
        self._report(decision)
        return decision

    def _depends_on(self, transformer: VisionTransformer, context: dict[str, Any]) -> tuple[Any, ...]:
        """What a decision holds for; another model, device, batch, precision or wish needs another decision.

        Models of one shape differ in what a cut costs, so the model counts itself, as long as it lives; not its
        weights, which training changes from one validation to the next.
        """
        wishes = (self._reduction, self.schedule, self.objective, self.block, self.protocol, self.target)
        return (ref(transformer.root), context, *wishes)

    def _check_form(self, batch: Any, batch_idx: int) -> None:
        form = batch_shape(batch, self.images_from_batch) if self._form else None
        difference = self._form.difference(form) if self._form and form else None
        if difference is not None:
            rank_zero_warn(
                f"Batch {batch_idx} {difference}. Pruning goes on, but its measured latency is for that size."
            )
            self._form = None

    def _figures(self) -> dict[str, float]:
        return self.decision.metrics() if self._running is not None and self.decision is not None else {}

    def _report(self, decision: Decision) -> None:
        for difference in decision.differences:
            rank_zero_warn(f"The schedule was made elsewhere: {difference}.")
        if self.verbose:
            from lightning_prune.callbacks.decision import print_decision

            print_decision(decision)

    def _close(self, trainer: L.Trainer) -> None:
        if self._running is not None and self._running() not in (None, trainer):
            return  # a run of another Trainer, which was refused in `setup`
        self.compilation.end()
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._form, self._running = None, None, None
