"""The result of planning: the plan with the schedule to deploy, and what it was chosen from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.planning.candidates import MIXED, Candidate
from lightning_prune.planning.objectives import Objective
from lightning_prune.planning.reasons import no_gain
from lightning_prune.profiling import Estimate, LatencyProfile, LatencyStats
from lightning_prune.reduction import Reduction, resolve, spec_of
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """A schedule to deploy, and what it was chosen from.

    Attributes:
        schedule: Tokens that each block removes; it names its method and says what it was made on.
        method: The method as a spec: its name, and the settings that differ from its defaults. `"mixed"` if blocks have
            different ones, which `schedule` names.
        reduction: The method itself; None if blocks have different ones.
        objective: What was optimised.
        met: Whether the objective is met; False only for a budget that was missed.
        reason: Why this schedule, and for a budget that was missed the best that can be had.
        profile: The latency curve that was planned on.
        proxy: What the accuracy estimate measures.
        accuracy: The proxy of the schedule relative to dense.
        predicted_ratio: Predicted latency of the schedule over dense.
        dense: LatencyStats of the dense model, from a run together with the schedule, or from the last run before;
            None if nothing was timed.
        pruned: LatencyStats of the schedule.
        front: All candidates that no other of their method beats, and those that were timed; dense first. Those whose
            blocks have different methods are named `"mixed"`.
        label: Name of the method in `front`.
        images: Number of calibration images that the proxy was measured on.
        sensitivity_images: Number of them that the sensitivity of the blocks was measured on.
        sensitivity_seconds: Time that the sensitivities of all methods took.
        seconds: Time that planning took, profiling included if no profile was given.
        accuracy_stderr: Standard error of the proxy over the calibration images; infinite where it is not known.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> images = torch.randn(2, 3, 224, 224)
        >>> plan = lp.plan(model, images, calibration=images, methods="topk", time_limit=2, verbose=False)
        >>> plan.front[0].schedule.removed, plan.front[0].accuracy
        ((0, 0), 1.0)
    """

    schedule: Schedule
    method: str
    reduction: Reduction | None
    objective: Objective
    met: bool
    reason: str
    profile: LatencyProfile
    proxy: str = ""
    accuracy: float = 1.0
    predicted_ratio: float = 1.0
    dense: LatencyStats | None = None
    pruned: LatencyStats | None = None
    front: tuple[Candidate, ...] = ()
    label: str = ""
    images: int = 0
    sensitivity_images: int = 0
    sensitivity_seconds: float = 0.0
    seconds: float = 0.0
    accuracy_stderr: float = 0.0

    @classmethod
    def of(
        cls,
        candidate: Candidate,
        reduction: Reduction | None,
        objective: Objective,
        met: bool,
        reason: str,
        profile: LatencyProfile,
        **more: Any,
    ) -> Self:
        """The plan that deploys a candidate.

        Args:
            candidate: What was chosen, its proxy and perhaps its timing included.
            reduction: The method; None if the schedule of the candidate names one for each block.
            objective: What it was chosen by.
            met: Whether the objective is met.
            reason: Why it was chosen.
            profile: The latency curve.
            **more: Other attributes.
        """
        made_on = MeasurementSource.from_context(
            profile.context,
            objective=str(objective),
            dense_tokens=profile.dense_tokens,
            protocol=profile.protocol,
            proxy=more.get("proxy", ""),
        )
        method = candidate.schedule.method if reduction is None else spec_of(reduction)
        return cls(
            schedule=Schedule(candidate.schedule.removed, method, made_on),
            method=MIXED if reduction is None else str(method),
            reduction=reduction,
            objective=objective,
            met=met,
            reason=reason,
            profile=profile,
            accuracy=1.0 if candidate.accuracy is None else candidate.accuracy,
            accuracy_stderr=0.0 if candidate.is_dense else candidate.accuracy_stderr,
            predicted_ratio=candidate.ratio,
            pruned=candidate.timing,
            label=candidate.method,
            **more,
        )

    @property
    def dense_tokens(self) -> int:
        """N, tokens of the dense model."""
        return self.profile.dense_tokens

    @property
    def tokens(self) -> int:
        """Tokens that leave the last block."""
        return self.schedule.tokens(self.dense_tokens)[-1]

    @property
    def total_removed(self) -> int:
        """Tokens removed by all blocks together."""
        return self.schedule.total_removed

    @property
    def dense_ms(self) -> float:
        """Latency of the dense model: timed while planning if it was, else of the profile."""
        return self.dense.milliseconds if self.dense else self.profile.dense_ms

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """95% interval of the proxy over images like those of the calibration; None where it is not known."""
        return Estimate(self.accuracy, self.accuracy_stderr).interval

    @property
    def predicted_ms(self) -> float:
        """Predicted latency: the predicted ratio times `dense_ms`, since the machine may have changed its speed."""
        return self.predicted_ratio * self.dense_ms

    @property
    def latency_ms(self) -> float:
        """Latency of the schedule: measured if it was, else predicted."""
        return self.pruned.milliseconds if self.pruned else self.predicted_ms

    @property
    def speedup(self) -> float:
        """Dense latency over that of the schedule: from rounds in which both ran, else predicted."""
        return 1 / (self.pruned.ratio if self.pruned else self.predicted_ratio)

    def or_dense_if_slower(self) -> Self:
        """This plan, or one that removes nothing if the schedule was timed and saves less than 2%."""
        reason = None if self.pruned is None else no_gain(self.schedule, self.dense_tokens, self.pruned)
        if reason is None:
            return self
        spec = next(iter(self.schedule.methods.values()))  # nothing is removed by it
        return replace(
            self,
            schedule=Schedule([0] * self.schedule.depth, spec, self.schedule.made_on),
            method=str(spec),
            reduction=resolve(spec) if self.reduction is None else self.reduction,
            met=self.objective.dense_is_feasible(self.dense_ms),
            accuracy=1.0,
            accuracy_stderr=0.0,
            predicted_ratio=1.0,
            reason=reason,
            pruned=None,
        )

    def save(self, path: str | Path) -> Path:
        """Writes the schedule, as JSON if `path` ends in `.json` and as YAML otherwise; returns the path."""
        return self.schedule.save(path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "schedule": self.schedule.to_dict(),
            "method": self.method,
            "objective": str(self.objective),
            "met": self.met,
            "reason": self.reason,
            "proxy": self.proxy,
            "accuracy": self.accuracy,
            "accuracy_interval": None if self.accuracy_interval is None else list(self.accuracy_interval),
            "tokens": self.tokens,
            "removed": self.total_removed,
            "dense_ms": self.dense_ms,
            "dense_p90_ms": self.dense.p90_ms if self.dense else None,
            "latency_ms": self.latency_ms,
            "latency_p90_ms": self.pruned.p90_ms if self.pruned else None,
            "predicted_ms": self.predicted_ms,
            "speedup": self.speedup,
            "seconds": self.seconds,
            "images": self.images,
            "sensitivity_images": self.sensitivity_images,
            "sensitivity_seconds": self.sensitivity_seconds,
            "front": [candidate.to_dict() for candidate in self.front],
        }
