"""The variants of a comparison: as requested, as planned, and as a validation runs them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

import lightning as L

from lightning_prune.callbacks.distributed import refuse_sharded
from lightning_prune.callbacks.hooks import EvaluationCallback
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning.api import AUTO_METHODS
from lightning_prune.profiling import LatencyStats, Variant, VariantSwitch
from lightning_prune.quantization import Int8Weights
from lightning_prune.reduction import Reduction, names, resolve
from lightning_prune.schedule import KeepRates, Schedule

DENSE_NAME, INT8_NAME, AUTO_NAME = "dense", "int8", "auto"
_AND_INT8 = "+int8"


class VariantRequest(NamedTuple):
    """A method of a comparison.

    Attributes:
        name: As the user calls it: `pomt`, `int8`, `pomt+int8`.
        reduction: The reduction; None where no token goes.
        int8: Whether the model runs in 8 bits.
        searched: The methods of which the planner chooses; none where the name says which it is.
    """

    name: str
    reduction: Reduction | None
    int8: bool
    searched: tuple[str, ...] = ()

    @property
    def searches(self) -> bool:
        """Whether method and blocks are left to the planner."""
        return bool(self.searched)

    @property
    def method(self) -> str:
        """What the column `method` says."""
        if self.reduction is None and not self.searches:
            return INT8_NAME if self.int8 else ""
        return self.name.removesuffix(_AND_INT8)

    @property
    def has_targets(self) -> bool:
        """Whether its latency can be chosen, so that it gets a row for each target."""
        return self.searches or (self.reduction is not None and not self.reduction.adaptive)


def read_methods(methods: Sequence[str], own: Reduction) -> list[VariantRequest]:
    """The entries that the names stand for; dense comes first and is added where it is missing.

    Args:
        methods: Names of reductions, `auto`, `dense`, `int8`, and names of reductions with `+int8`.
        own: The reduction of the pruner: its name means this instance, with its settings.

    Raises:
        ArgumentError: If there is no such method (suggests the nearest), one occurs twice, or none is left to compare
            with dense.

    Example:
        >>> from lightning_prune.comparison.variants import read_methods
        >>> from lightning_prune.reduction import POMT
        >>> [entry.name for entry in read_methods(["pomt+int8", "int8"], own=POMT())]
        ['dense', 'pomt+int8', 'int8']
    """
    if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
        raise ArgumentError(f"`methods` must be a list of names, got {methods!r}.")
    twice = sorted({str(name) for name in methods if list(methods).count(name) > 1})
    if twice:
        raise ArgumentError(f"`methods` must differ from one another, got {twice[0]!r} twice.")
    entries = [_read(name, own) for name in methods if name != DENSE_NAME]
    if not entries:
        raise ArgumentError(f"`methods` must name one to compare with dense, got {list(methods)!r}.")
    return [VariantRequest(DENSE_NAME, None, False), *entries]


def _read(name: object, own: Reduction) -> VariantRequest:
    if not isinstance(name, str):
        raise ArgumentError(f"`methods` must hold names, got {name!r}.")
    if name == INT8_NAME:
        return VariantRequest(name, None, True)
    if name == AUTO_NAME:
        return VariantRequest(name, None, False, AUTO_METHODS)
    plain = name.removesuffix(_AND_INT8)
    try:
        reduction = own if plain == own.name else resolve(plain)
    except ArgumentError as error:
        known = names()
        if plain in known:  # it exists, but needs what a name cannot say, as a vocabulary
            raise
        near = get_close_matches(plain.lower(), [*known, AUTO_NAME, DENSE_NAME, INT8_NAME], n=1)
        with_int8 = name != plain
        meant = [
            close + _AND_INT8 * with_int8 if close in known else INT8_NAME if with_int8 else close for close in near
        ]
        hint = f" Did you mean {meant[0]!r}?" if meant else ""
        listed = ", ".join([DENSE_NAME, *known, AUTO_NAME, INT8_NAME])
        raise ArgumentError(
            f"`methods` must be of {listed}, or two of them as pomt+int8; got {name!r}.{hint}"
        ) from error
    return VariantRequest(name, reduction, name != plain)


_PLAIN = ("variant", "request", "method", "int8", "chosen", "target_speedup", "note")


@dataclass(frozen=True)
class PlannedVariant:
    """A variant of a comparison.

    Attributes:
        variant: Its name: `dense`, `pomt 1.25x`, `int8`.
        request: The name of its request.
        method: The method, as the table calls it.
        int8: Whether it runs in 8 bits.
        target_speedup: The speed-up that it was planned for.
        settings: Of the reduction.
        schedule: What it removes, with its method; None for dense, int8, and where the images decide.
        timing: Of the interleaved run of all variants; None where it cannot be run.
        note: What is to be said of it, as why it cannot.
        joules_per_image: Energy; None where there is no counter.
        watts: Mean power.
        chosen: Name of the reduction that `auto` chose; empty where the entry says it.
    """

    variant: str
    request: str
    method: str = ""
    int8: bool = False
    target_speedup: float | None = None
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
        return self.request, self.schedule

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
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


def reduction_of(planned: PlannedVariant, entry: VariantRequest) -> Reduction | None:
    """The method of a planned variant; None where no token goes. Those that `auto` chooses from have names."""
    return resolve(planned.chosen) if planned.chosen else entry.reduction


def variant_of(planned: PlannedVariant, entry: VariantRequest) -> Variant:
    """What a planned variant runs as."""
    reduction = reduction_of(planned, entry)
    weights = Int8Weights if entry.int8 else None
    if reduction is None or (planned.schedule is not None and not planned.schedule.total_removed):
        return Variant(weights=weights)
    return Variant(reduction, planned.schedule, weights)


@dataclass(frozen=True)
class UnreachedTarget:
    """A target that a method cannot reach.

    Attributes:
        method: The method, as the user calls it.
        target_speedup: The speed-up.
        best: The largest that was measured.
        reason: Why, in a sentence.
    """

    method: str
    target_speedup: float
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
    unreached: list[UnreachedTarget]
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
            unreached=[UnreachedTarget(**unreached) for unreached in values["unreached"]],
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
        if isinstance(variant.schedule, Schedule) and transformer.num_tokens is None:  # images of other sizes may come
            rates = KeepRates.of(variant.schedule, self.dense_tokens, transformer.num_prefix_tokens)
            variant = variant._replace(schedule=rates)
        self._switch = VariantSwitch(transformer)  # before anything can fail: `_close` takes off what is on
        self._switch.to(variant)

    def _figures(self) -> dict[str, float]:
        return {}

    def _close(self, trainer: L.Trainer) -> None:
        switch, self._switch = self._switch, None
        if switch is not None:
            switch.off()
