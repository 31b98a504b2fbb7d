"""What a comparison is asked for: the variants that are wanted, and the settings that they share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_prune.callbacks import PruningConfig
from lightning_prune.planning import Objective
from lightning_prune.quantization import Int8Weights
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes import Runtime, TorchEager
from lightning_prune.schedule import ScheduleLike

DENSE_NAME, INT8_NAME = "dense", "int8"
AND_INT8 = "+int8"  # the end of a name


class VariantRequest(NamedTuple):
    """What is to be compared with dense: a method at target speed-ups, or one variant.

    Attributes:
        name: Its name, unique in a comparison: `pomt`, `int8`, `pomt+int8`, `auto accuracy budget`, `pomt given`.
        reduction: The reduction; None where no token is removed, the planner chooses it, or the schedule that was given
            names one for each block.
        int8: Whether the model runs in 8 bits.
        searched: The methods from which the planner chooses; empty where the method is fixed.
        objective: What its schedule is planned by; None where target speed-ups decide, or there is nothing to plan.
        schedule: The schedule that was given; None where it is planned.
        label: The method as the user calls it, where that is not the name.
        runtime: What executes the model.
        suffix: The end of its name that says the runtime; empty where there is one runtime only.
        exact: Whether it is the dense model with the exact tail.
        tail: As of `lightning_prune.patch`, for whatever removes tokens.
        is_control: Whether nobody named it: it is there for the others to be judged by.
    """

    name: str
    reduction: Reduction | None
    int8: bool
    searched: tuple[str, ...] = ()
    objective: Objective | None = None
    schedule: ScheduleLike | None = None
    label: str = ""
    runtime: Runtime = TorchEager()
    suffix: str = ""
    exact: bool = False
    tail: bool | None = None
    is_control: bool = False

    @property
    def stem(self) -> str:
        """Its name without the runtime."""
        return self.name.removesuffix(self.suffix)

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model."""
        return self.stem == DENSE_NAME

    @property
    def searches(self) -> bool:
        """Whether method and blocks are left to the planner."""
        return bool(self.searched)

    @property
    def execution(self) -> Runtime:
        """What executes it: in 8 bits the quantized form of the runtime, where that has a quantizer of its own."""
        return self.quantizing or self.runtime

    @property
    def quantizing(self) -> Runtime | None:
        """The quantized form of the runtime; None for floating point, and where the weights are quantized instead.

        Raises:
            RuntimeUnavailableError: If the quantizer of the runtime is not installed.
        """
        return self.runtime.quantized() if self.int8 else None

    @property
    def weights(self) -> type[Int8Weights] | None:
        """What makes the weights to run with; None for those of the model."""
        return Int8Weights if self.int8 and self.quantizing is None else None

    @property
    def method(self) -> str:
        """What the column `method` says."""
        if self.reduction is None and not (self.searches or self.exact) and self.schedule is None:
            return INT8_NAME if self.int8 else ""
        return (self.label or self.stem).removesuffix(AND_INT8)

    @property
    def has_targets(self) -> bool:
        """Whether it is open how many tokens are removed, so that it has a variant for each target speed-up."""
        if self.objective is not None or self.schedule is not None:
            return False
        return self.searches or (self.reduction is not None and not self.reduction.adaptive)

    def planned_by(self, objective: Objective) -> "VariantRequest":
        """The one variant that an objective makes of this request."""
        return self._replace(name=f"{self.name} {_kind_of(objective)}", objective=objective, label=self.name)


@dataclass(frozen=True)
class ComparisonSettings:
    """What was asked for.

    Attributes:
        config: All settings of pruning.
        requests: What is compared in each runtime, dense first.
        runtimes: What executes the model.
        speedups: The targets, ascending; empty where there are none.
        output: Folder for what is written; None where nothing is.
        resume: Whether to go on from what is known there.
        limit_val_batches: Of the trainer.
        metric: The key of the metric of each image in what the step returns; None where the module logs its metric.
    """

    config: PruningConfig
    requests: Sequence[VariantRequest]
    runtimes: Sequence[Runtime]
    speedups: Sequence[float]
    output: Path | None
    resume: bool
    limit_val_batches: int | float | None
    metric: str | None = None


def _kind_of(objective: Objective) -> str:
    """The class of an objective in words: of `LatencyBudget` "latency budget"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(objective).__name__).lower()
