"""Where a schedule was made, and a warning where it is used elsewhere: its latency was measured there only."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_prune.device import device_name
from lightning_prune.keep_rates import KeepRates
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class Origin:
    """What a schedule's latency depends on most.

    Attributes:
        device: What the maker calls the device it was measured on; None where the schedule does not say.
        batch_size: Images in a batch; None where the schedule does not say.
    """

    device: str | None
    batch_size: int | None

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> "Origin | None":
        """From what travels with a schedule; None where it says nothing of this."""
        device, batch_size = provenance.get("device"), provenance.get("batch_size")
        return cls(device, batch_size) if device is not None or batch_size is not None else None

    def differences(self, device: str, batch_size: int) -> tuple[str, ...]:
        """What is other here than there, each in words."""
        pairs = (("device", self.device, device), ("batch_size", self.batch_size, batch_size))
        return tuple(f"{name} {there} there, {here} here" for name, there, here in pairs if there not in (None, here))

    def warn(self, x: Tensor) -> None:
        """Warns, once for each patch, if tokens (B, N, C) of another device or batch size than its own arrive."""
        differences = self.differences(device_name(x.device), x.shape[0])
        if differences:
            warnings.warn(
                f"The schedule was made elsewhere: {'; '.join(differences)}. It is used as it is, but its latency was "
                "measured there.",
                stacklevel=2,
            )


def without_origin(schedule: Schedule | KeepRates) -> Schedule | KeepRates:
    """The schedule for measuring: that is what elsewhere asks for, and no place for a warning."""
    kept = {key: value for key, value in schedule.provenance.items() if key not in ("device", "batch_size")}
    return KeepRates(schedule.rates, kept) if isinstance(schedule, KeepRates) else Schedule(schedule.removed, kept)
