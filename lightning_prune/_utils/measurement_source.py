"""What a schedule was measured on: device, batch size, precision, runtime."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_prune._utils.validation import as_int
from lightning_prune.errors import ScheduleError


@dataclass(frozen=True, kw_only=True)
class MeasurementSource:
    """What a schedule's latency was measured on.

    It never changes what a schedule does. A schedule that is used on something else leads to a warning.

    Attributes:
        device: Name of the device.
        batch_size: Number of images in a batch.
        precision: For example `"float32"` or `"bf16-mixed"`.
        image_shape: (channels, height, width).
        runtime: The runtime, such as `"torch"`.
        dense_tokens: N, tokens that entered block 0, prefix tokens included.
        objective: The objective that the schedule was optimised for.
        details: Everything else, such as versions and threads; plain values that YAML and JSON can hold.

    Example:
        >>> from lightning_prune._utils.measurement_source import MeasurementSource
        >>> MeasurementSource(device="Jetson Orin", batch_size=1).differences(device="Jetson Orin", batch_size=8)
        ('batch_size 1 there, 8 here',)
    """

    device: str | None = None
    batch_size: int | None = None
    precision: str | None = None
    image_shape: tuple[int, ...] | None = None
    runtime: str | None = None
    dense_tokens: int | None = None
    objective: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ScheduleError if an entry has the wrong type."""
        for name in ("device", "precision", "runtime", "objective"):
            if not isinstance(getattr(self, name), str | None):
                raise ScheduleError(f"`made_on.{name}` must be text or None, got {getattr(self, name)!r}.")
        for name in ("batch_size", "dense_tokens"):
            if getattr(self, name) is not None and as_int(getattr(self, name)) is None:
                raise ScheduleError(f"`made_on.{name}` must be an integer or None, got {getattr(self, name)!r}.")
        if not isinstance(self.image_shape, list | tuple | None):
            raise ScheduleError(f"`made_on.image_shape` must be three integers or None, got {self.image_shape!r}.")
        if not isinstance(self.details, Mapping):
            raise ScheduleError(f"`made_on.details` must be a mapping, got {self.details!r}.")
        object.__setattr__(self, "image_shape", None if self.image_shape is None else tuple(self.image_shape))
        object.__setattr__(self, "details", dict(self.details))

    def __hash__(self) -> int:
        return hash((self.device, self.batch_size, self.precision, self.image_shape, self.runtime, self.dense_tokens))

    @classmethod
    def from_context(cls, context: Mapping[str, Any], **more: Any) -> "MeasurementSource":
        """Creates a source from a measurement context; entries that are not fields become `details`.

        Args:
            context: As returned by `lightning_prune.profiling.measurement_context`.
            **more: Further entries, which take precedence.
        """
        entries = {**context, **more}
        own = {f.name: entries.pop(f.name) for f in fields(cls) if f.name != "details" and f.name in entries}
        details = entries.pop("details", {})
        return cls(**own, details={**details, **entries} if isinstance(details, Mapping) else details)

    def differences(self, **here: Any) -> tuple[str, ...]:
        """Describes the fields whose values differ from the given ones. Fields that are None in either are left out.

        Args:
            **here: Field -> its value in the current run.
        """
        pairs = ((name, getattr(self, name), value) for name, value in here.items())
        return tuple(
            f"{name} {there} there, {value} here"
            for name, there, value in pairs
            if there is not None and value is not None and there != value
        )

    def warn_elsewhere(self, **here: Any) -> None:
        """Warns if a schedule that was measured on this is used on something else; see `differences`."""
        differences = self.differences(**here)
        if differences:
            warnings.warn(
                f"The schedule was made elsewhere: {'; '.join(differences)}. It is used unchanged, but its latency was "
                "measured there.",
                stacklevel=3,
            )

    def to_plain(self) -> dict[str, Any]:
        """The known entries as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
        return plain if plain["details"] else {name: v for name, v in plain.items() if name != "details"}

    @classmethod
    def from_plain(cls, values: Any) -> "MeasurementSource":
        """The inverse of `to_plain`; unknown entries become `details`.

        Raises:
            ScheduleError: If `values` is not a mapping, or an entry has the wrong type.
        """
        if not isinstance(values, Mapping):
            raise ScheduleError(f"`made_on` must be a mapping, got {values!r}.")
        return cls.from_context(values)
