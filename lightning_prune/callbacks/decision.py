"""Decides the schedule of a run: plans one, or times the one that was given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import Tensor, nn

from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.callbacks.batches import Calibration
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import PatchHandle, VisionTransformer, check_schedule, find_vision_transformer
from lightning_prune.patching.compatibility import check_depth
from lightning_prune.patching.schedule_forms import resolve_schedule
from lightning_prune.planning import Objective, Plan, plan_many
from lightning_prune.planning.api import PROFILE_SHARE
from lightning_prune.planning.measurements import TimeLimit
from lightning_prune.profiling import (
    TOKEN_CURVE,
    compare_latency,
    measurement_context,
)
from lightning_prune.profiling.cache import CachedProfile, get_or_profile
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_variants import Variant
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import KeepRates, Schedule

_GIVEN_SHARE = 0.2  # of the time limit, for timing a schedule that is given and not planned
_TRAVELS = ("device", "batch_size", "precision", "image_shape")  # what a schedule's latency depends on most


@dataclass(frozen=True)
class Decision:
    """The schedule of a run and its measured latency.

    Attributes:
        schedule: What the blocks remove.
        method: Name of the reduction.
        dense_tokens: N.
        tokens: Tokens that leave the last reducing block.
        dense_ms: Latency of the unpruned model on one batch.
        latency_ms: Latency with the schedule, measured in the same interleaved run.
        speedup: Dense over pruned, from rounds in which both ran.
        predicted_ms: Latency that was predicted from the profile; None for a given schedule.
        reason: Why this schedule.
        context: Device, batch, precision and versions of the measurement.
        seconds: Time that the decision took.
        plan: The whole plan; None for a given schedule.
        calibration: The images on which accuracy was estimated, in words; empty for a given schedule.
        differences: How the place where a given schedule was made differs from this run.
        keep_rates: The keep rates that were given; None for counts.
        reused: When the latency profile was measured, if in an earlier run; else empty.
        reduction: The method that the planner chose; None for a given schedule.
        adaptive: Whether the images decide how many tokens are removed. The schedule then removes nothing, and `tokens`
            is the count of the longest image of the batch that was measured.
    """

    schedule: Schedule
    method: str
    dense_tokens: int
    tokens: int
    dense_ms: float
    latency_ms: float
    speedup: float
    predicted_ms: float | None
    reason: str
    context: dict[str, Any]
    seconds: float = 0.0
    plan: Plan | None = None
    calibration: str = ""
    differences: tuple[str, ...] = ()
    keep_rates: KeepRates | None = None
    reused: str = ""
    reduction: Reduction | None = None
    adaptive: bool = False

    @property
    def prunes(self) -> bool:
        """Whether there is anything to patch."""
        return self.adaptive or self.schedule.total_removed > 0

    def metrics(self) -> dict[str, float]:
        """The figures as Lightning logs them."""
        return {
            "pruning/latency_ms": self.latency_ms,
            "pruning/dense_latency_ms": self.dense_ms,
            "pruning/speedup": self.speedup,
            "pruning/tokens": float(self.tokens),
            "pruning/removed": float(self.dense_tokens - self.tokens if self.adaptive else self.schedule.total_removed),
        }

    def deployable(self, transformer: VisionTransformer) -> Schedule | KeepRates | None:
        """The schedule to patch with; None where the images decide how many tokens are removed.

        Keep rates if they were given, or if a schedule was planned for a model that takes images of several sizes.
        """
        if self.adaptive:
            return None
        if self.keep_rates is not None:
            return KeepRates(self.keep_rates.rates, self.keep_rates.method)
        if transformer.num_tokens is None and self.plan is not None:
            return KeepRates.of(
                Schedule(self.schedule.removed, self.schedule.method), self.dense_tokens, transformer.num_prefix_tokens
            )
        return Schedule(self.schedule.removed, self.schedule.method)

    @classmethod
    def from_plan(cls, plan: Plan, calibration: str, reused: bool = False) -> "Decision":
        """The decision of a plan.

        Args:
            plan: The plan.
            calibration: The images on which accuracy was estimated, in words.
            reused: Whether its latency profile was measured in an earlier run.
        """
        return cls(
            schedule=plan.schedule,
            method=plan.method,
            dense_tokens=plan.profile.dense_tokens,
            tokens=plan.tokens,
            dense_ms=plan.dense_ms,
            latency_ms=plan.latency_ms,
            speedup=plan.speedup,
            predicted_ms=plan.predicted_ms,
            reason=plan.reason,
            context=dict(plan.profile.context),
            seconds=plan.seconds,
            plan=plan,
            calibration=calibration,
            reduction=plan.reduction,
            reused=str(plan.profile.context.get("measured", "before")) if reused else "",
        )


def _latency(decision: Decision) -> str:
    dense = f"dense {decision.dense_ms:.2f} ms"
    if not decision.prunes:
        return dense
    predicted = f" (predicted {decision.predicted_ms:.2f} ms)" if decision.predicted_ms is not None else ""
    return f"{dense}, pruned {decision.latency_ms:.2f} ms{predicted}: {decision.speedup:.2f}x"


def decision_panel(decision: Decision) -> Panel:
    """Device, model, N, chosen R and block, predicted and measured latency, why, and how long it took."""
    context = decision.context
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    threads = f", {context.get('threads', '?')} threads" if context.get("device_type") == "cpu" else ""
    compiled = ", compiled" if context.get("compiled") else ""
    parameters = f", {context['parameters'] / 1e6:.1f} M parameters" if "parameters" in context else ""
    table.add_row("device", f"{context.get('device', '?')}{threads}")
    table.add_row("model", f"{context.get('model', '?')}{parameters}{compiled}")
    table.add_row("batch", f"{context.get('batch_size', '?')} images, {context.get('precision', '?')}")
    removed = ", ".join(f"{remove} at block {block}" for block, remove in decision.schedule.reducing.items())
    removed += " by keep rate" if removed and decision.keep_rates is not None else ""
    table.add_row("tokens", f"{decision.dense_tokens} -> {decision.tokens}")
    how_many = f"R = {decision.schedule.total_removed} ({decision.method}: {removed})" if removed else "R = 0"
    table.add_row("removed", f"depends on the image ({decision.method})" if decision.adaptive else how_many)
    table.add_row("latency", _latency(decision))
    table.add_row("because", decision.reason)
    if decision.calibration:
        table.add_row("judged by", decision.calibration)
    if decision.reused:
        table.add_row("profile", f"of {decision.reused}, kept; `use_cache=False` measures it again")
    table.add_row("took", f"{decision.seconds:.0f} s")
    return Panel(table, title="Token pruning", title_align="left", expand=False)


def print_decision(decision: Decision, console: Console | None = None) -> None:
    """Prints the panel."""
    (console or Console()).print(decision_panel(decision))


def _differences(made_on: MeasurementSource | None, context: dict[str, Any], n: int) -> tuple[str, ...]:
    if made_on is None:
        return ()
    here = {key: context[key] for key in _TRAVELS} | {"image_shape": tuple(context["image_shape"]), "dense_tokens": n}
    return made_on.differences(**here)


def measure_given(
    model: nn.Module,
    images: Tensor,
    reduction: Reduction,
    schedule: Schedule | KeepRates,
    time_limit: float,
    target: str | None,
    progress: bool,
) -> Decision:
    """Times a schedule that the user gave against the dense model.

    Raises:
        ScheduleError: If it was made for another depth or token count, or asks a block for too much.
    """
    transformer = find_vision_transformer(model, target)
    with ready_to_run(transformer):
        n = transformer.count_tokens(images)
        context = measurement_context(transformer.compiled_root, images)
    rates = schedule if isinstance(schedule, KeepRates) else None
    if isinstance(schedule, KeepRates):
        check_depth(transformer, schedule)
        counts = schedule.schedule(n, transformer.num_prefix_tokens)
    else:
        counts = schedule
    check_schedule(transformer, reduction, counts)
    variants: dict[str, tuple[str | Reduction, Schedule] | None] = {"dense": None}
    if counts.total_removed:
        variants["pruned"] = (reduction, counts)
    timings = compare_latency(model, images, variants, time_limit=time_limit, module_path=target, verbose=progress)
    pruned = timings.get("pruned", timings["dense"])  # nothing removed: the model is the dense one
    return Decision(
        schedule=counts,
        method=reduction.name,
        dense_tokens=n,
        tokens=counts.tokens(n)[-1],
        dense_ms=timings["dense"].milliseconds,
        latency_ms=pruned.milliseconds,
        speedup=1 / pruned.ratio,
        predicted_ms=None,
        reason="The schedule was given.",
        context=context,
        differences=_differences(schedule.made_on, context, n),
        keep_rates=rates,
    )


def _tokens_left(transformer: VisionTransformer, images: Tensor, reduction: Reduction) -> int:
    """Tokens of the longest image that leave the first block, counted in a forward pass."""
    handle = PatchHandle(transformer, reduction)
    seen: list[int] = []
    block = transformer.blocks[transformer.first_prunable_block]
    hook = block.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    try:
        transformer.root.forward(images)  # not `root(images)`: a compiled graph would not call the hook
    finally:
        hook.remove()
        handle.remove()
    return seen[0]


def measure_adaptive(
    model: nn.Module, images: Tensor, reduction: Reduction, time_limit: float, target: str | None, progress: bool
) -> Decision:
    """Times the model with an adaptive method against the dense model, on one batch.

    Args:
        model: Contains the Vision Transformer, which is dense.
        images: (B, channels, height, width).
        reduction: The method.
        time_limit: Time limit.
        target: Dotted path of the transformer, where there are several.
        progress: Shows a bar on a terminal.

    Raises:
        ArgumentError: If the method was made for another model.
        UnsupportedModelError: If the model cannot do what the method needs.
    """
    transformer = find_vision_transformer(model, target)
    with ready_to_run(transformer):
        n = transformer.count_tokens(images)
        left = _tokens_left(transformer, images, reduction)
        context = measurement_context(transformer.compiled_root, images)
    variants = {"dense": None, "pruned": Variant(reduction)}
    timings = compare_latency(model, images, variants, time_limit=time_limit, module_path=target, verbose=progress)
    dense, pruned = timings["dense"], timings["pruned"]
    return Decision(
        schedule=Schedule([0] * transformer.depth),
        method=reduction.name,
        dense_tokens=n,
        tokens=left,
        dense_ms=dense.milliseconds,
        latency_ms=pruned.milliseconds,
        speedup=1 / pruned.ratio,
        predicted_ms=None,
        reason=f"The images decide; the longest of this batch keeps {left} of {n} tokens.",
        context=context,
        adaptive=True,
    )


def profiled(
    config: PruningConfig, pl_module: L.LightningModule, images: Tensor, of_method: bool = False
) -> CachedProfile:
    """The latency curve to plan on; to be called under the trainer's precision.

    Args:
        config: Method, block, time limit, and where profiles are kept.
        pl_module: The module, dense.
        images: (B, C, H, W) as the transformer receives them.
        of_method: Measures the curve of the method at its block instead, if one is given, and takes all of the time
            limit; a curve to plan on takes a share of it.
    """
    # One curve serves all methods and blocks, except that of the paper's protocol: how far it goes depends on both.
    general = config.plans_blocks or not (of_method or config.protocol == "paper")
    method, block = (TOKEN_CURVE, 0) if general else (config.reduction, config.place)
    seconds = config.time_limit if of_method else PROFILE_SHARE * config.time_limit
    return get_or_profile(
        pl_module,
        images,
        config.store(),
        method=method,
        block=block,
        protocol=config.protocol,
        time_limit=None if config.protocol == "paper" else seconds,
        module_path=config.module_path,
        verbose=config.verbose,
    )


def warn_if_wrapped_by_compile(pl_module: L.LightningModule) -> None:
    """Warns where the LightningModule itself is compiled: what is measured is not what will run."""
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        rank_zero_warn(
            "The whole LightningModule is compiled, but latency is measured on its Vision Transformer alone, which is "
            "not. Compile the transformer instead, as in `module.vit.compile()`."
        )


def check_labels(config: PruningConfig, calibration: Calibration) -> None:
    """Raises ArgumentError where the paper's protocol has no labels, before hours of profiling."""
    if config.protocol == "paper" and calibration.labels is None:
        raise ArgumentError("`calibration` must have labels with protocol='paper', got batches without.")


def _blocks(config: PruningConfig, depth: int) -> str | int | float | list[int]:
    """The blocks that may reduce: one, unless all are searched or the method reduces in many from there on."""
    if config.plans_blocks:
        return "all"
    if config.reduction.multi_block:
        return "all" if isinstance(config.place, float) else list(range(config.place, depth))
    return config.place


def planned_for(
    config: PruningConfig,
    pl_module: L.LightningModule,
    images: Tensor,
    calibration: Calibration,
    objectives: Sequence[Objective],
    profile: CachedProfile | None = None,
    limit: TimeLimit | None = None,
) -> list[Decision]:
    """Plans a schedule for each of several objectives, measured once for all of them.

    Args:
        config: What was asked for; its objective is not used.
        pl_module: The module, dense.
        images: (B, C, H, W) as the transformer receives them.
        calibration: Images, and labels where the protocol needs them.
        objectives: In any order.
        profile: The latency profile; that of `profiled` if None.
        limit: The time limit, which may have begun before; that of the config, beginning now, if None.

    Raises:
        ArgumentError: As `check_labels`, and as `lightning_prune.plan`.
    """
    check_labels(config, calibration)
    limit = TimeLimit(config.time_limit) if limit is None else limit
    profile = profiled(config, pl_module, images) if profile is None else profile
    plans = plan_many(
        pl_module,
        images,
        objectives,
        calibration=calibration.images,
        methods=config.methods,
        blocks=_blocks(config, find_vision_transformer(pl_module, config.module_path).depth),
        profile=profile.profile,
        time_limit=config.time_limit if config.protocol == "paper" else limit.share(1.0),
        seed=config.seed,
        verbose=config.verbose,
        module_path=config.module_path,
        protocol=config.protocol,
        labels=calibration.labels if config.protocol == "paper" else None,
        clock=limit.clock,
    )
    return [Decision.from_plan(made, calibration.source, profile.reused) for made in plans]


def planned(
    config: PruningConfig,
    pl_module: L.LightningModule,
    images: Tensor,
    calibration: Calibration,
    profile: CachedProfile | None = None,
    limit: TimeLimit | None = None,
) -> Decision:
    """Plans a schedule by the objective of the config; see `planned_for`."""
    (decision,) = planned_for(config, pl_module, images, calibration, [config.goal], profile, limit)
    return decision


def decide(first: FirstBatch) -> Decision:
    """Decides on the first batch: plans a schedule, or times the one that was given, against the dense model.

    Args:
        first: The batch and what was asked for.

    Raises:
        ArgumentError: If a setting does not fit the model or the data.
        ScheduleError: If a given schedule does not fit the model.
        UnsupportedModelError: As `lightning_prune.patch`.
    """
    config, module, images, limit = first.config, first.module, first.images, TimeLimit(first.config.time_limit)
    warn_if_wrapped_by_compile(module)
    if config.is_planned:
        if config.verbose and config.protocol == "deployed":
            print(f"Planning a schedule for this device and batch takes up to {config.time_limit:g} s (`time_limit`).")
        return planned(config, module, images, first.calibration(), limit=limit)
    seconds = _GIVEN_SHARE * config.time_limit
    if config.is_adaptive:
        return measure_adaptive(module, images, config.reduction, seconds, config.module_path, config.verbose)
    schedule = resolve_schedule(config.schedule, first.transformer, config.reduction, config.place, images)
    return measure_given(module, images, config.reduction, schedule, seconds, config.module_path, config.verbose)
