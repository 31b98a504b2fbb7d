"""The variants of a comparison, as planned and as deployed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L

from lightning_prune.callbacks.distributed import refuse_sharded
from lightning_prune.callbacks.hooks import EvaluationCallback
from lightning_prune.comparison.method_specs import MethodSpec
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling import LatencyStats, Variant, VariantSwitch
from lightning_prune.quantization import Int8Weights
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import KeepRates, Schedule

_PLAIN = ("variant", "entry", "method", "int8", "chosen", "target", "note")


@dataclass(frozen=True)
class PlannedVariant:
    """A variant of a comparison.

    Attributes:
        variant: Its name: `dense`, `pomt 1.25x`, `int8`.
        entry: The method, as the user calls it.
        method: The method, as the table calls it.
        int8: Whether it runs in 8 bits.
        target: The speed-up that it was planned for.
        settings: Of the reduction.
        schedule: What it removes, with its method; None for dense, int8, and where the images decide.
        timing: Of the interleaved run of all variants; None where it cannot be run.
        note: What is to be said of it, as why it cannot.
        joules_per_image: Energy; None where there is no counter.
        watts: Mean power.
        chosen: Name of the reduction that `auto` chose; empty where the entry says it.
    """

    variant: str
    entry: str
    method: str = ""
    int8: bool = False
    target: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None
    timing: LatencyStats | None = None
    note: str = ""
    joules_per_image: float | None = None
    watts: float | None = None
    chosen: str = ""

    @property
    def runs(self) -> tuple[str, Schedule | None]:
        """What is run: variants of which this is the same are the same model."""
        return self.entry, self.schedule

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **{
                name: getattr(self, name) for name in ("variant", "entry", "method", "int8", "chosen", "target", "note")
            },
            "settings": dict(self.settings),
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "timing": None if self.timing is None else asdict(self.timing),
            "joules_per_image": self.joules_per_image,
            "watts": self.watts,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PlannedVariant":
        """The inverse of `to_dict`."""
        schedule, timing = values["schedule"], values["timing"]
        read = {
            "schedule": None if schedule is None else Schedule.from_dict(schedule),
            "timing": None if timing is None else LatencyStats(**timing),
        }
        return cls(**{**values, **read})


def reduction_of(planned: PlannedVariant, entry: MethodSpec) -> Reduction | None:
    """The method of a planned variant; None where no token goes. Those that `auto` chooses from have names."""
    return resolve(planned.chosen) if planned.chosen else entry.reduction


def variant_of(planned: PlannedVariant, entry: MethodSpec) -> Variant:
    """What a planned variant runs as."""
    reduction = reduction_of(planned, entry)
    weights = Int8Weights if entry.int8 else None
    if reduction is None or (planned.schedule is not None and not planned.schedule.total_removed):
        return Variant(weights=weights)
    return Variant(reduction, planned.schedule, weights)


@dataclass(frozen=True)
class MissedTarget:
    """A target that a method cannot reach.

    Attributes:
        method: The method, as the user calls it.
        target: The speed-up.
        best: The largest that was measured.
        reason: Why, in a sentence.
    """

    method: str
    target: float
    best: float
    reason: str


@dataclass(frozen=True)
class ComparisonPlan:
    """Everything that was decided.

    Attributes:
        planned: The variants, dense first.
        unreached: Targets without a variant.
        context: Device, batch, precision and versions.
        dense_tokens: N.
        energy: Where joules come from, or why there are none.
        seconds: What deciding took.
        started: When, as an ISO date.
    """

    planned: list[PlannedVariant]
    unreached: list[MissedTarget]
    context: Mapping[str, Any]
    dense_tokens: int
    energy: str
    seconds: float
    started: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = {name: getattr(self, name) for name in ("dense_tokens", "energy", "seconds", "started")}
        return {
            "planned": [planned.to_dict() for planned in self.planned],
            "unreached": [asdict(unreached) for unreached in self.unreached],
            "context": dict(self.context),
            **plain,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ComparisonPlan":
        """The inverse of `to_dict`."""
        plain = {name: values[name] for name in ("context", "dense_tokens", "energy", "seconds", "started")}
        return cls(
            planned=[PlannedVariant.from_dict(planned) for planned in values["planned"]],
            unreached=[MissedTarget(**unreached) for unreached in values["unreached"]],
            **plain,
        )


class Deployment(EvaluationCallback):
    """Makes the Vision Transformer of a LightningModule run as a variant from the first batch to the end of a run.

    Args:
        variant: What to run as.
        dense_tokens: N, of the images that the variant was planned for.
        target: Dotted path of the transformer, where there are several.
    """

    def __init__(self, variant: Variant, dense_tokens: int, target: str | None) -> None:
        self.variant, self.dense_tokens, self.target = variant, dense_tokens, target
        self._switch: VariantSwitch | None = None

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._switch is not None:
            return
        refuse_sharded(trainer)
        transformer = find_vision_transformer(pl_module, self.target)
        variant = self.variant
        if isinstance(variant.schedule, Schedule) and transformer.tokens is None:  # images of other sizes may come
            rates = KeepRates.of(variant.schedule, self.dense_tokens, transformer.prefix_tokens)
            variant = variant._replace(schedule=rates)
        self._switch = VariantSwitch(transformer)  # before anything can fail: `_close` takes off what is on
        self._switch.to(variant)

    def _figures(self) -> dict[str, float]:
        return {}

    def _close(self, trainer: L.Trainer) -> None:
        switch, self._switch = self._switch, None
        if switch is not None:
            switch.off()
