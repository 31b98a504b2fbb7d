"""The outcome of planning over several blocks: a plan, and the whole front that it was chosen from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_prune.planning.plan import Plan
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import Self


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
        >>> plan = plan_blocks(model, images, example_batch=images, methods=["topk"], max_seconds=1, progress=False)
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

    def unless_slow(self) -> "Self":
        """This plan, or one that removes nothing if the final comparison does not bear out the prediction."""
        made = super().unless_slow()
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

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the fronts and the chosen schedule; saves it where a path is given."""
        from lightning_prune.report.front import plot_front
        from lightning_prune.report.plots import save_figure

        figure = plot_front(self)
        if path is not None:
            save_figure(figure, path)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, the front among them."""
        return {
            **super().to_dict(),
            "images": self.images,
            "sensitivity_seconds": self.sensitivity_seconds,
            "front": [entry.to_dict() for entry in self.front],
        }
