"""What was decided before anything is validated: the variants, how fast they are, and what cannot be reached."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_prune.comparing.entries import Entry
from lightning_prune.profiling import Timing, Variant
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import Schedule

_PLAIN = ("variant", "entry", "method", "int8", "chosen", "target", "note")


@dataclass(frozen=True)
class Planned:
    """A variant of a comparison.

    Attributes:
        variant: Its name: `dense`, `pomt 1.25x`, `int8`.
        entry: The method, as the user calls it.
        method: The method, as the table calls it.
        int8: Whether it runs in 8 bits.
        target: The speed-up that it was planned for.
        settings: Of the reduction.
        schedule: What it removes, with its provenance; None for dense, int8, and where the images decide.
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
    timing: Timing | None = None
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
    def from_dict(cls, values: Mapping[str, Any]) -> "Planned":
        """The inverse of `to_dict`."""
        schedule, timing = values["schedule"], values["timing"]
        read = {
            "schedule": None if schedule is None else Schedule.from_dict(schedule),
            "timing": None if timing is None else Timing(**timing),
        }
        return cls(**{**values, **read})


def reduction_of(planned: Planned, entry: Entry) -> Reduction | None:
    """The method of a planned variant; None where no token goes. Those that `auto` chooses from have names."""
    return resolve(planned.chosen) if planned.chosen else entry.reduction


def variant_of(planned: Planned, entry: Entry) -> Variant:
    """What a planned variant runs as."""
    reduction = reduction_of(planned, entry)
    if reduction is None or (planned.schedule is not None and not planned.schedule.total):
        return Variant(int8=entry.int8)
    return Variant(reduction, planned.schedule, entry.int8)


@dataclass(frozen=True)
class Unreached:
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
class Decided:
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

    planned: list[Planned]
    unreached: list[Unreached]
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
    def from_dict(cls, values: Mapping[str, Any]) -> "Decided":
        """The inverse of `to_dict`."""
        plain = {name: values[name] for name in ("context", "dense_tokens", "energy", "seconds", "started")}
        return cls(
            planned=[Planned.from_dict(planned) for planned in values["planned"]],
            unreached=[Unreached(**unreached) for unreached in values["unreached"]],
            **plain,
        )
