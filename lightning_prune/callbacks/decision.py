"""What was decided for a run: the schedule, its latency, and why."""

from dataclasses import dataclass
from typing import Any

from lightning_prune.patching import VisionTransformer
from lightning_prune.planning import Plan
from lightning_prune.planning.candidates import MIXED
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import KeepRates, Schedule


@dataclass(frozen=True)
class Decision:
    """The schedule of a run and its measured latency.

    Attributes:
        schedule: What the blocks remove.
        method: Name of the reduction; `"mixed"` where the schedule names one for each block.
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
        reduction: The method; None where the schedule names one for each block.
        dense_p90_ms: 90th percentile of the latency of the unpruned model; None where it was not timed.
        p90_ms: That with the schedule.
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
    dense_p90_ms: float | None = None
    p90_ms: float | None = None

    @property
    def prunes(self) -> bool:
        """Whether there is anything to patch."""
        return self.adaptive or self.schedule.total_removed > 0

    @property
    def is_mixed(self) -> bool:
        """Whether blocks have different methods, which the schedule names."""
        return self.method == MIXED

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
        """The schedule to patch with.

        Args:
            transformer: What will be patched.

        Returns:
            Keep rates if they were given, or if a schedule was planned for a model that takes images of several sizes;
            else token counts. None where the images decide how many tokens are removed.
        """
        if self.adaptive:
            return None
        if self.keep_rates is not None:
            return self.keep_rates
        if transformer.num_tokens is None and self.plan is not None:
            return KeepRates.of(self.schedule, self.dense_tokens, transformer.num_prefix_tokens)
        return self.schedule

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
            dense_p90_ms=plan.dense.p90_ms if plan.dense else None,
            p90_ms=plan.pruned.p90_ms if plan.pruned else None,
            reused=str(plan.profile.context.get("measured", "before")) if reused else "",
        )
