"""Plans: a schedule with everything that it was decided from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_prune.planning.objectives import Objective
from lightning_prune.profiling import LatencyProfile, LatencyStats
from lightning_prune.profiling.latency_profile import SAVING
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class Plan:
    """A schedule with its reasons.

    Attributes:
        schedule: What to deploy; it names its method and says where it was made.
        method: The reduction to deploy it with.
        block: The reducing block; the first that may reduce, of methods that reduce in many.
        objective: What was optimised.
        profile: The latency curve it was chosen on.
        proxy: What the accuracy estimate means.
        accuracy: Token count -> proxy relative to dense, for the counts it was measured at.
        tokens: The chosen count; N where nothing is removed.
        reason: Why, in a sentence.
        dense: Timing of the unpruned model, measured beside the chosen point; None where it was not.
        pruned: Timing of the chosen point itself.
        seconds: How long planning took, and profiling where no profile was given.
    """

    schedule: Schedule
    method: str
    block: int
    objective: Objective
    profile: LatencyProfile
    proxy: str
    accuracy: Mapping[int, float]
    tokens: int
    reason: str
    dense: LatencyStats | None = None
    pruned: LatencyStats | None = None
    seconds: float = 0.0

    @property
    def removed(self) -> int:
        """R, tokens removed."""
        return self.schedule.total_removed

    @property
    def predicted_ms(self) -> float:
        """Latency of the chosen point according to the profile: its share of dense there, times dense as of now.

        The two runs find the machine in different states, so only the share carries over.
        """
        return self.profile.latency_ms(self.tokens) / self.profile.dense_ms * self.dense_ms

    @property
    def dense_ms(self) -> float:
        """Latency of the unpruned model: of the final comparison where there was one, else of the profile."""
        return self.dense.milliseconds if self.dense else self.profile.dense_ms

    @property
    def latency_ms(self) -> float:
        """Latency of the chosen point: of the final comparison where there was one, else of the profile."""
        return self.pruned.milliseconds if self.pruned else self.predicted_ms

    @property
    def speedup(self) -> float:
        """Dense over pruned: of the final comparison, from rounds in which both ran, else of the profile."""
        return 1 / self.pruned.ratio if self.pruned else self.profile.dense_ms / self.profile.latency_ms(self.tokens)

    def or_dense_if_slower(self) -> "Self":
        """This plan, or one that removes nothing if the final comparison does not bear out the profile."""
        if self.pruned is None or self.pruned.ratio < 1 - SAVING:
            return self
        took = f"{100 * self.pruned.ratio:.1f}% of dense"
        return replace(
            self,
            schedule=Schedule([0] * self.schedule.depth, self.schedule.method, self.schedule.made_on),
            tokens=self.dense_tokens,
            reason=f"Measured beside dense, {self.tokens} tokens take {took}, against the profile: nothing is gained.",
            pruned=None,
        )

    @property
    def dense_tokens(self) -> int:
        """N."""
        return self.profile.dense_tokens

    def scores(self) -> dict[int, float]:
        """Token count -> value of the objective, for the counts whose accuracy was measured."""
        counts = sorted(self.accuracy)
        latency = np.array([self.profile.latency_ms(count) for count in counts])
        accuracy = np.array([self.accuracy[count] for count in counts])
        return dict(zip(counts, self.objective.score(latency, accuracy).tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "schedule": self.schedule.to_dict(),
            "method": self.method,
            "block": self.block,
            "objective": str(self.objective),
            "proxy": self.proxy,
            "accuracy": {int(count): float(value) for count, value in sorted(self.accuracy.items())},
            "tokens": self.tokens,
            "removed": self.removed,
            "reason": self.reason,
            "dense_ms": self.dense_ms,
            "latency_ms": self.latency_ms,
            "predicted_ms": self.predicted_ms,
            "speedup": self.speedup,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class FrontEntry:
    """A schedule that none of its method beats in both latency and accuracy, by the models of the planner.

    Attributes:
        method: The reduction, with the settings that tell it apart where two have one name.
        schedule: What each block removes.
        milliseconds: Predicted latency.
        cost: Predicted KL divergence from the dense outputs, in nats an image.
        accuracy: The proxy relative to dense, where it was measured.
    """

    method: str
    schedule: Schedule
    milliseconds: float
    cost: float
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.method,
            "removed": list(self.schedule.removed),
            "milliseconds": self.milliseconds,
            "cost": self.cost,
            "accuracy": self.accuracy,
        }


@dataclass(frozen=True)
class BlocksPlan(Plan):
    """A plan over several blocks, perhaps of several methods.

    `accuracy` holds the proxy of the chosen schedule only; that of others stands in the front.

    Attributes:
        front: For every method, from dense to the fastest.
        predicted_ratio: Predicted latency of the chosen schedule over dense.
        reduction: The method.
        images: How many images the sensitivity of the blocks was measured on, by every method.
        sensitivity_seconds: How long that took for all methods.
        label: What the front calls the method.

    Example:
        >>> import timm
        >>> import torch
        >>> from lightning_prune.planning import plan_blocks
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> images = torch.randn(2, 3, 224, 224)
        >>> plan = plan_blocks(model, images, example_inputs=images, methods=["topk"], time_limit=1, progress=False)
        >>> plan.front[0].schedule.removed, plan.front[0].accuracy
        ((0, 0), 1.0)
    """

    front: tuple[FrontEntry, ...] = ()
    predicted_ratio: float = 1.0
    reduction: Reduction | None = None
    images: int = 0
    sensitivity_seconds: float = 0.0
    label: str = ""

    @property
    def predicted_ms(self) -> float:
        """Latency of the chosen schedule according to the models: its share of dense, times dense as of now."""
        return self.predicted_ratio * self.dense_ms

    @property
    def speedup(self) -> float:
        """Dense over pruned: of the final comparison, from rounds in which both ran, else as predicted."""
        return 1 / self.pruned.ratio if self.pruned else 1 / self.predicted_ratio

    def or_dense_if_slower(self) -> "Self":
        """This plan, or one that removes nothing if the final comparison does not bear out the prediction."""
        made = super().or_dense_if_slower()
        return made if made is self else replace(made, predicted_ratio=1.0)

    def scores(self) -> dict[int, float]:
        """Token count -> value of the objective, of the schedules of the front whose accuracy was measured.

        Latencies are predicted; of several schedules that leave as many tokens, it is the best value.
        """
        n = self.dense_tokens
        entries = [entry for entry in self.front if entry.accuracy is not None]
        latency = np.array([*(entry.milliseconds for entry in entries), self.profile.dense_ms])
        accuracy = np.array([*(entry.accuracy for entry in entries), 1.0], dtype=float)
        counts = [*(entry.schedule.tokens(n)[-1] for entry in entries), n]
        found: dict[int, float] = {}
        for count, value in sorted(zip(counts, self.objective.score(latency, accuracy).tolist(), strict=True)):
            found[count] = value  # ascending, so the best of a count stays
        return found

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, the front among them."""
        return {
            **super().to_dict(),
            "images": self.images,
            "sensitivity_seconds": self.sensitivity_seconds,
            "front": [entry.to_dict() for entry in self.front],
        }
