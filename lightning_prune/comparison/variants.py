"""The variants of a comparison: as requested, as planned, and as a validation runs them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, NamedTuple, cast

import lightning as L

from lightning_prune._utils.validation import check
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.first_batch import refuse_sharded
from lightning_prune.callbacks.hooks import EvaluationCallback
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning import Objective, Utility
from lightning_prune.planning.method_selection import AUTO_METHODS
from lightning_prune.profiling import LatencyProfile, LatencyStats, Variant, VariantSwitch
from lightning_prune.quantization import Int8Weights
from lightning_prune.reduction import POMT, Reduction, names, resolve
from lightning_prune.schedule import KeepRates, Schedule, ScheduleLike

DENSE_NAME, INT8_NAME, AUTO_NAME = "dense", "int8", "auto"
_AND_INT8 = "+int8"


class VariantRequest(NamedTuple):
    """What is to be compared with dense: a method at target speed-ups, or one variant.

    Attributes:
        name: Its name, unique in a comparison: `pomt`, `int8`, `pomt+int8`, `auto accuracy budget`, `pomt given`.
        reduction: The reduction; None where no token is removed, or the planner chooses it.
        int8: Whether the model runs in 8 bits.
        searched: The methods from which the planner chooses; empty where the method is fixed.
        objective: What its schedule is planned by; None where target speed-ups decide, or there is nothing to plan.
        schedule: The schedule that was given; None where it is planned.
        label: The method as the user calls it, where that is not the name.
    """

    name: str
    reduction: Reduction | None
    int8: bool
    searched: tuple[str, ...] = ()
    objective: Objective | None = None
    schedule: ScheduleLike | None = None
    label: str = ""

    @property
    def searches(self) -> bool:
        """Whether method and blocks are left to the planner."""
        return bool(self.searched)

    @property
    def method(self) -> str:
        """What the column `method` says."""
        if self.reduction is None and not self.searches:
            return INT8_NAME if self.int8 else ""
        return (self.label or self.name).removesuffix(_AND_INT8)

    @property
    def has_targets(self) -> bool:
        """Whether it is open how many tokens are removed, so that it has a variant for each target speed-up."""
        if self.objective is not None or self.schedule is not None:
            return False
        return self.searches or (self.reduction is not None and not self.reduction.adaptive)

    def planned_by(self, objective: Objective) -> "VariantRequest":
        """The one variant that an objective makes of this request."""
        return self._replace(name=f"{self.name} {_kind_of(objective)}", objective=objective, label=self.name)


def read_requests(
    config: PruningConfig,
    methods: Sequence[str | Reduction] | None,
    speedups: Sequence[float] | None,
    objective: Objective,
) -> list[VariantRequest]:
    """What a comparison consists of, dense first.

    Each method is planned for every target speed-up or, without `speedups`, by the objective. Without `methods` it is
    the method of the config. Without either, the POMT paper's own choice (its utility, alpha 0.5) is added, or a given
    schedule is the only variant.

    Args:
        config: Method, schedule and objective; its own reduction is meant by its name among `methods`.
        methods: Reductions and names: of reductions, `auto`, `dense`, `int8`, and of reductions with `+int8`.
        speedups: The targets; None if there are none.
        objective: Plans the schedules where there are no targets.

    Raises:
        ArgumentError: If there is no such method, one occurs twice, none is left to compare with dense, or a method in
            8 bits has no targets.
    """
    is_given = config.schedule != "auto"
    check("protocol", config.protocol, "'deployed' with `speedups`", speedups is None or config.protocol == "deployed")
    if methods is not None:
        requests = read_methods(methods, config.method if isinstance(config.method, Reduction) else None)
    elif is_given and speedups is None:
        requests = [VariantRequest(DENSE_NAME, None, False)]
    else:
        requests = read_methods([config.method], None)
    if speedups is None:
        for request in requests:
            valid = not (request.has_targets and request.int8)
            check("speedups", speedups, f"given for {request.name}, which is not planned by an objective", valid)
        requests = [request.planned_by(objective) if request.has_targets else request for request in requests]
    if methods is None and speedups is None and not is_given and not config.is_adaptive:
        paper = VariantRequest(POMT.name, POMT(), False).planned_by(Utility(0.5))
        if not any((each.reduction, each.objective) == (paper.reduction, paper.objective) for each in requests):
            requests.insert(1, paper)
    if is_given:
        own = config.reduction
        requests.append(
            VariantRequest(f"{own.name} given", own, False, schedule=cast(Any, config.schedule), label=own.name)
        )
    names = [request.name for request in requests]
    return [
        request._replace(name=f"{request.label} {request.objective}") if names.count(request.name) > 1 else request
        for request in requests
    ]


def read_methods(methods: Sequence[str | Reduction], own: Reduction | None) -> list[VariantRequest]:
    """The requests that names of methods stand for; dense comes first and is added where it is missing.

    Args:
        methods: Reductions and names: of reductions, `auto`, `dense`, `int8`, and of reductions with `+int8`.
        own: The reduction that its name means, with its settings.

    Raises:
        ArgumentError: If there is no such method (suggests the nearest), one occurs twice, or none is left to compare
            with dense.

    Example:
        >>> from lightning_prune.comparison.variants import read_methods
        >>> [request.name for request in read_methods(["pomt+int8", "int8"], own=None)]
        ['dense', 'pomt+int8', 'int8']
    """
    if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
        raise ArgumentError(f"`methods` must be a list of names, got {methods!r}.")
    read = [_read(name, own) for name in methods if not (isinstance(name, str) and name == DENSE_NAME)]
    names = [request.name for request in read]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ArgumentError(f"`methods` must differ from one another, got {repeated!r} twice.")
    if not read:
        raise ArgumentError(f"`methods` must name one to compare with dense, got {list(methods)!r}.")
    return [VariantRequest(DENSE_NAME, None, False), *read]


def _read(name: object, own: Reduction | None) -> VariantRequest:
    if isinstance(name, Reduction):
        return VariantRequest(name.name, name, False)
    if not isinstance(name, str):
        raise ArgumentError(f"`methods` must hold names and reductions, got {name!r}.")
    if name == INT8_NAME:
        return VariantRequest(name, None, True)
    if name == AUTO_NAME:
        return VariantRequest(name, None, False, AUTO_METHODS)
    plain = name.removesuffix(_AND_INT8)
    try:
        reduction = own if own is not None and plain == own.name else resolve(plain)
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


def _kind_of(objective: Objective) -> str:
    """The class of an objective in words: of `LatencyBudget` "latency budget"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(objective).__name__).lower()


@dataclass(frozen=True)
class PlannedVariant:
    """A variant of a comparison with its schedule and its latency, before it is validated.

    Attributes:
        variant: Its name: `dense`, `pomt 1.25x`, `int8`.
        request: The name of its request.
        method: The method, as the table calls it.
        int8: Whether it runs in 8 bits.
        target_speedup: The speed-up that it was planned for.
        settings: Of the reduction.
        schedule: What it removes; None for dense, int8, and where the images decide.
        timing: Of the interleaved run of all variants; None where it cannot be run.
        note: A remark, such as why it cannot be run.
        joules_per_image: Energy; None where there is no counter.
        watts: Mean power.
        chosen: Name of the reduction that `auto` chose; empty where the request says it.
        keep_rates: The keep rates that were given; None where tokens were counted.
        plan: How an objective led to the schedule, as plain values; None where none did.
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
    keep_rates: KeepRates | None = None
    plan: Mapping[str, Any] | None = None

    @property
    def reason(self) -> str:
        """Why it has this schedule, where an objective led to it."""
        return "" if self.plan is None else str(self.plan["reason"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "settings": dict(self.settings),
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "keep_rates": None if self.keep_rates is None else self.keep_rates.to_dict(),
            "timing": None if self.timing is None else asdict(self.timing),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PlannedVariant":
        """The inverse of `to_dict`."""
        schedule, rates, timing = values["schedule"], values["keep_rates"], values["timing"]
        read = {
            "schedule": None if schedule is None else Schedule.from_dict(schedule),
            "keep_rates": None if rates is None else KeepRates.from_dict(rates),
            "timing": None if timing is None else LatencyStats(**timing),
        }
        return cls(**{**values, **read})


def reduction_of(planned: PlannedVariant, request: VariantRequest) -> Reduction | None:
    """The method of a planned variant; None where no token is removed. Those that `auto` chooses from have names."""
    return resolve(planned.chosen) if planned.chosen else request.reduction


def variant_of(planned: PlannedVariant, request: VariantRequest) -> Variant:
    """What a planned variant runs as."""
    reduction = reduction_of(planned, request)
    weights = Int8Weights if request.int8 else None
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
    """All variants with their schedules and latencies, before any is validated.

    Attributes:
        planned: The variants, dense first.
        unreached: Target speed-ups without a variant.
        context: Device, batch, precision and versions.
        dense_tokens: N.
        energy: Where joules come from, or why there are none.
        seconds: What planning and timing took.
        started: When, as an ISO date.
        profile: Latency against the number of tokens.
        calibration: Which images the accuracy was estimated on; empty where it was not.
    """

    planned: list[PlannedVariant]
    unreached: list[UnreachedTarget]
    context: Mapping[str, Any]
    dense_tokens: int
    energy: str
    seconds: float
    started: str
    profile: LatencyProfile | None = None
    calibration: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "planned": [planned.to_dict() for planned in self.planned],
            "unreached": [asdict(unreached) for unreached in self.unreached],
            "context": dict(self.context),
            "profile": None if self.profile is None else self.profile.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ComparisonPlan":
        """The inverse of `to_dict`."""
        profile = values["profile"]
        read = {
            "planned": [PlannedVariant.from_dict(planned) for planned in values["planned"]],
            "unreached": [UnreachedTarget(**unreached) for unreached in values["unreached"]],
            "profile": None if profile is None else LatencyProfile.from_dict(profile),
        }
        return cls(**{**values, **read})


class Deployment(EvaluationCallback):
    """Makes the Vision Transformer of a LightningModule run as a variant from the first batch to the end of a run.

    Args:
        variant: What to run as.
        dense_tokens: N, of the images that the variant was planned for.
        module_path: Dotted path of the transformer, where there are several.
    """

    def __init__(self, variant: Variant, dense_tokens: int, module_path: str | None) -> None:
        self.variant, self.dense_tokens, self.module_path = variant, dense_tokens, module_path
        self._switch: VariantSwitch | None = None

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._switch is not None:
            return
        refuse_sharded(trainer)
        transformer = find_vision_transformer(pl_module, self.module_path)
        variant = self.variant
        if isinstance(variant.schedule, Schedule) and transformer.num_tokens is None:  # images of other sizes may come
            rates = KeepRates.of(variant.schedule, self.dense_tokens, transformer.num_prefix_tokens)
            variant = variant._replace(schedule=rates)
        self._switch = VariantSwitch(transformer)  # before anything can fail: `_close` restores what is changed
        self._switch.to(variant)

    def _figures(self) -> dict[str, float]:
        return {}

    def _close(self, trainer: L.Trainer) -> None:
        switch, self._switch = self._switch, None
        if switch is not None:
            switch.off()
