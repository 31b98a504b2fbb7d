"""What was planned for a comparison: each variant with its schedule and latency, before any is validated."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_prune.comparison.requests import VariantRequest
from lightning_prune.patching.exact_tail import EXACT
from lightning_prune.profiling import LatencyProfile, LatencyStats, Variant
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.runtimes import parse_runtime
from lightning_prune.schedule import KeepRates, Schedule


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
        schedule: What it removes; None for dense, exact, int8, and where the images decide.
        timing: Of the interleaved run of all variants; None where it cannot be run.
        note: A remark, such as why it cannot be run.
        gmacs: 10^9 multiply-accumulates of an image; None in 8 bits.
        peak_memory_mib: MiB of weights and activations of a batch; None in 8 bits.
        joules_per_image: Energy; None where there is no counter.
        watts: Mean power.
        chosen: Name of the reduction that `auto` chose, or of several, each with its blocks; empty where the request
            says it.
        keep_rates: The keep rates that were given; None where tokens were counted.
        plan: How an objective led to the schedule, as plain values; None where none did.
        runtime: What executes the model.
        speedup_vs_eager: Latency of the dense model in float32 and PyTorch without compilation over that of the
            variant, from rounds in which both ran; None where that was not timed.
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
    gmacs: float | None = None
    peak_memory_mib: float | None = None
    joules_per_image: float | None = None
    watts: float | None = None
    chosen: str = ""
    keep_rates: KeepRates | None = None
    plan: Mapping[str, Any] | None = None
    runtime: str = "torch"
    speedup_vs_eager: float | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model; a variant of a method may remove nothing, too, and is not."""
        return not self.method and not self.int8

    @property
    def execution(self) -> str:
        """The spec of what executes it: in 8 bits the quantized form of the runtime, where that has a quantizer."""
        runtime = parse_runtime(self.runtime)
        return ((runtime.quantized() if self.int8 else None) or runtime).name

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
    """The method of a planned variant; None where no token is removed, or the schedule names one for each block.

    Those that `auto` chooses from have names.
    """
    schedule = planned.schedule
    if schedule is not None and (isinstance(schedule.method, tuple) or not schedule.total_removed):
        return None
    return resolve(planned.chosen) if planned.chosen else request.reduction


def chosen_text(reduction: Reduction | None, schedule: Schedule) -> str:
    """What `auto` chose: the name of the method, or of several each with its blocks, as `topk 3, tome 6+9`."""
    return schedule.method_label if reduction is None else reduction.name


def variant_of(planned: PlannedVariant, request: VariantRequest) -> Variant:
    """What a planned variant runs as."""
    reduction = reduction_of(planned, request)
    schedule = planned.schedule
    if request.exact:
        return Variant(EXACT, None, request.weights, request.execution, request.tail)
    removes = reduction is not None if schedule is None else schedule.total_removed > 0
    if not removes:
        return Variant(weights=request.weights, runtime=request.execution)
    return Variant(reduction, schedule, request.weights, request.execution, request.tail)


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

    def dense_of(self, planned: PlannedVariant) -> PlannedVariant:
        """The dense model in the runtime of a variant."""
        return next(each for each in self.planned if each.is_dense and each.runtime == planned.runtime)

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


def plain_value(value: Any) -> Any:
    """A setting as a file can hold it: a number, a text or None as it is, anything else as a line of text."""
    plain = isinstance(value, bool | int | float | str) or value is None
    return value if plain else " ".join(repr(value).split())[:500]


def plain_settings(reduction: Reduction | None) -> dict[str, Any]:
    """The settings of a method as a file can hold them; none without a method."""
    settings = {} if reduction is None else reduction.settings()
    return {key: plain_value(value) for key, value in settings.items()}
