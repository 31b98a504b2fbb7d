"""What a callback decided: the schedule that a run uses, and what it is known to cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import ScheduleError
from lightning_prune.keep_rates import KeepRates
from lightning_prune.patching import VisionTransformer, check_schedule, find_vision_transformer
from lightning_prune.patching.checks import check_depth
from lightning_prune.planning import BlocksPlan, Plan
from lightning_prune.profiling import compare_latency, measurement_context, reducing_block, spread_schedule
from lightning_prune.profiling.latency import count_tokens, ready_to_run
from lightning_prune.profiling.spreading import reduces_often
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

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
        predicted_ms: What the profile said before; None where the schedule was given.
        reason: Why this schedule.
        context: Device, batch, precision and versions of the measurement.
        seconds: What deciding took.
        plan: The whole plan, where one was made.
        calibration: Which images it was judged by, where a plan was made.
        differences: How a given schedule's origin differs from this run.
        keep_rates: The keep rates that were given; None where tokens were counted.
        reused: When the latency profile was measured, where that was in an earlier run; empty elsewhere.
        reduction: The method, where the planner chose it.
        adaptive: Whether the images decide how many tokens go. The schedule is empty then, and `tokens` those of the
            longest image of the batch that was measured.
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
        return self.adaptive or self.schedule.total > 0

    def metrics(self) -> dict[str, float]:
        """The figures as Lightning logs them."""
        return {
            "pruning/latency_ms": self.latency_ms,
            "pruning/dense_latency_ms": self.dense_ms,
            "pruning/speedup": self.speedup,
            "pruning/tokens": float(self.tokens),
            "pruning/removed": float(self.dense_tokens - self.tokens if self.adaptive else self.schedule.total),
        }

    def deployable(self, transformer: VisionTransformer) -> Schedule | KeepRates | None:
        """What to patch with: keep rates where they were given, or were planned and the images decide the token count.

        The device and the batch were compared when this was decided; a patch need not do so again. None where the
        images decide how many tokens go.
        """
        if self.adaptive:
            return None
        if self.keep_rates is not None:
            return KeepRates(self.keep_rates.rates)
        if transformer.tokens is None and self.plan is not None:
            return KeepRates.of(Schedule(self.schedule.removed), self.dense_tokens, transformer.prefix_tokens)
        return Schedule(self.schedule.removed, {"tokens_dense": self.dense_tokens})

    @classmethod
    def from_plan(cls, plan: Plan, calibration: str, reused: bool = False) -> "Decision":
        """What a plan says that was judged by the images of this description.

        Args:
            plan: The plan.
            calibration: Which images.
            reused: Whether its latency profile is of an earlier run.
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
            calibration=calibration + (_searched(plan) if isinstance(plan, BlocksPlan) else ""),
            reduction=plan.reduction if isinstance(plan, BlocksPlan) else None,
            reused=str(plan.profile.context.get("measured", "before")) if reused else "",
        )


def _searched(plan: BlocksPlan) -> str:
    """What the search over blocks added to the calibration; nothing where it had no reason to."""
    if not plan.images:
        return ""
    return f"; the sensitivity of the blocks by {plan.images} of them, in {plan.sensitivity_seconds:.0f} s"


def given_schedule(
    schedule: int | float | list[int] | Schedule | KeepRates,
    block: int | float,
    transformer: VisionTransformer,
    reduction: Reduction,
    images: Tensor,
) -> Schedule | KeepRates:
    """A schedule from the forms that users write.

    R tokens, or the share of patch tokens to keep, in the form that the method is used in: at `block`, before block 0,
    or spread over the blocks; a list with one number a block; a `Schedule` or `KeepRates`.

    Args:
        schedule: What the user wrote.
        block: As `lightning_prune.profile_latency` takes it.
        transformer: The Vision Transformer.
        reduction: The method.
        images: (B, channels, height, width), of which the tokens are counted where that depends on their size.

    Raises:
        ScheduleError: If a method that reduces in many blocks cannot remove so many tokens.
    """
    if isinstance(schedule, Schedule | KeepRates):
        return schedule
    if isinstance(schedule, list):
        return Schedule(schedule)
    index, depth, prefix = reducing_block(reduction, block, transformer), transformer.depth, transformer.prefix_tokens
    if not reduces_often(reduction):
        if isinstance(schedule, int):
            return Schedule.single(depth, index, schedule)
        return KeepRates.single(depth, index, schedule)
    n = transformer.tokens
    if n is None:
        with ready_to_run(transformer):
            n = count_tokens(transformer, images)
    whole = (
        KeepRates.single(depth, index, schedule).schedule(n, prefix).total if isinstance(schedule, float) else schedule
    )
    most = reduction.most(n, prefix, depth, index)
    if whole > most:
        raise ScheduleError(
            f"{reduction.name} is asked to remove {whole} tokens in all, but of the {n} that enter it can remove at "
            f"most {most}."
        )
    counts = spread_schedule(reduction, whole, n, prefix, depth, index)
    return KeepRates.of(counts, n, prefix) if isinstance(schedule, float) else counts


def measure_given(
    model: nn.Module,
    images: Tensor,
    reduction: Reduction,
    schedule: Schedule | KeepRates,
    max_seconds: float,
    target: str | None,
    progress: bool,
) -> Decision:
    """Times a schedule that the user gave beside the dense model.

    Raises:
        ScheduleError: If it was made for another depth or token count, or asks a block for too much.
    """
    transformer = find_vision_transformer(model, target)
    with ready_to_run(transformer):
        n = count_tokens(transformer, images)
        context = measurement_context(transformer.runner, images)
    rates = schedule if isinstance(schedule, KeepRates) else None
    if isinstance(schedule, KeepRates):
        check_depth(transformer, schedule)
        counts = Schedule(schedule.schedule(n, transformer.prefix_tokens).removed)
    else:
        counts = schedule
    _refuse_foreign(counts, transformer, reduction, n)
    variants: dict[str, tuple[str | Reduction, Schedule] | None] = {"dense": None}
    if counts.total:
        variants["pruned"] = (reduction, counts)
    timings = compare_latency(model, images, variants, max_seconds=max_seconds, target=target, progress=progress)
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
        differences=_differences(schedule.provenance, reduction, context),
        keep_rates=rates,
    )


def _refuse_foreign(schedule: Schedule, transformer: VisionTransformer, reduction: Reduction, n: int) -> None:
    check_schedule(transformer, reduction, schedule)
    made_for = schedule.provenance.get("tokens_dense")
    if made_for is not None and made_for != n:
        raise ScheduleError(f"The schedule was made for {made_for} tokens; {n} enter this model.")


def _differences(origin: Mapping[str, Any], reduction: Reduction, context: dict[str, Any]) -> tuple[str, ...]:
    here = {key: context[key] for key in _TRAVELS} | {"method": reduction.name}
    return tuple(
        f"{key} {origin[key]} there, {value} here"
        for key, value in here.items()
        if key in origin and origin[key] != value
    )
