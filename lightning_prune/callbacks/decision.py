"""What a callback decided: the schedule that a run uses, and what it is known to cost."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import ScheduleError
from lightning_prune.patching import VisionTransformer, check_schedule, find_vision_transformer
from lightning_prune.planning import Plan
from lightning_prune.profiling import compare_latency, measurement_context, resolve_block
from lightning_prune.profiling.latency import count_tokens, ready_to_run
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

    def metrics(self) -> dict[str, float]:
        """The figures as Lightning logs them."""
        return {
            "pruning/latency_ms": self.latency_ms,
            "pruning/dense_latency_ms": self.dense_ms,
            "pruning/speedup": self.speedup,
            "pruning/tokens": float(self.tokens),
            "pruning/removed": float(self.schedule.total),
        }

    @classmethod
    def from_plan(cls, plan: Plan, calibration: str) -> "Decision":
        """What a plan says that was judged by the images of this description."""
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
        )


def given_schedule(schedule: int | list[int] | Schedule, block: int | float, depth: int) -> Schedule:
    """A schedule from the forms that users write: R tokens at `block`, a list with one number a block, a Schedule."""
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, int):
        return Schedule.single(depth, resolve_block(block, depth), schedule)
    return Schedule(schedule)


def deployed(schedule: Schedule) -> Schedule:
    """The schedule for `patch`, which would tell again, and of less, that it was made elsewhere."""
    return Schedule(schedule.removed, {k: v for k, v in schedule.provenance.items() if k not in _TRAVELS})


def measure_given(
    model: nn.Module,
    images: Tensor,
    reduction: Reduction,
    schedule: Schedule,
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
    _refuse_foreign(schedule, transformer, reduction, n)
    variants: dict[str, tuple[str | Reduction, Schedule] | None] = {"dense": None}
    if schedule.total:
        variants["pruned"] = (reduction, deployed(schedule))
    timings = compare_latency(model, images, variants, max_seconds=max_seconds, target=target, progress=progress)
    pruned = timings.get("pruned", timings["dense"])  # nothing removed: the model is the dense one
    return Decision(
        schedule=schedule,
        method=reduction.name,
        dense_tokens=n,
        tokens=schedule.tokens(n)[-1],
        dense_ms=timings["dense"].milliseconds,
        latency_ms=pruned.milliseconds,
        speedup=1 / pruned.ratio,
        predicted_ms=None,
        reason="The schedule was given.",
        context=context,
        differences=_differences(schedule, reduction, context),
    )


def _refuse_foreign(schedule: Schedule, transformer: VisionTransformer, reduction: Reduction, n: int) -> None:
    check_schedule(transformer, reduction, schedule)
    made_for = schedule.provenance.get("tokens_dense")
    if made_for is not None and made_for != n:
        raise ScheduleError(f"The schedule was made for {made_for} tokens; {n} enter this model.")


def _differences(schedule: Schedule, reduction: Reduction, context: dict[str, Any]) -> tuple[str, ...]:
    origin = schedule.provenance
    here = {key: context[key] for key in _TRAVELS} | {"method": reduction.name}
    return tuple(
        f"{key} {origin[key]} there, {value} here"
        for key, value in here.items()
        if key in origin and origin[key] != value
    )
