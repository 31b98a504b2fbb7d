"""Whether a latency profile still holds: the dense model is timed again and compared with what the profile says."""

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, inf, log, sqrt
from typing import NamedTuple

from torch import Tensor, nn

from lightning_prune._utils.formatting import three_digits
from lightning_prune.profiling.interleaved_timer import MEDIAN_STDERR, NORMAL_QUARTILE, LatencyStats
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.measurement import compare_latency


@dataclass(frozen=True)
class CheckTuning:
    """Constants of the check of a profile.

    Attributes:
        looks: Runs of the dense model: a few, and more of them only where these do not agree with the profile. Both
            have to say so: load spikes of a second must not cost a new measurement.
        time_share: Share of the time limit that each look may take.
        min_change: A smaller change is no other machine: clock rates alone vary by that.
        max_change: A larger change is one, however noisy the machine is.
        sigmas: Standard errors of both sides together that a change has to exceed.
        unknown_drift: Standard deviation of the speed of the machine, of a profile that does not say it.
    """

    looks: tuple[int, ...] = (5, 15)
    time_share: float = 0.05
    min_change: float = 0.05
    max_change: float = 0.5
    sigmas: float = 3.0
    unknown_drift: float = 0.03


TUNING = CheckTuning()


class DenseChange(NamedTuple):
    """The dense latency of a profile, and another one here and now; in milliseconds, with half the quartile range."""

    then_ms: float
    then_spread: float
    now_ms: float
    now_spread: float

    def __str__(self) -> str:
        """Both figures."""
        figures = [three_digits(each) for each in self]
        return f"{figures[0]} (± {figures[1]}) ms by the profile, {figures[2]} (± {figures[3]}) ms now"


def dense_change(
    profile: LatencyProfile,
    model: nn.Module,
    example_inputs: Tensor,
    *,
    time_limit: float | None,
    module_path: str | None,
    clock: Callable[[], float],
) -> DenseChange | None:
    """Times the dense model; returns both latencies where they differ by more than the noise of both, else None.

    The conditions of a profile do not include the load of the machine, its clock rate or its memory allocator.

    Args:
        profile: Of this model, under the conditions of now.
        model: Any module that contains one Vision Transformer, dense.
        example_inputs: (B, C, H, W) images on the device.
        time_limit: Seconds that measuring a profile has; a twentieth of it is used for each look. None for no limit.
        module_path: Dotted path of the transformer in `model`.
        clock: What runs are timed by.
    """
    seconds = None if time_limit is None else TUNING.time_share * time_limit
    found = None
    for rounds in TUNING.looks:
        now = compare_latency(
            model,
            example_inputs,
            {"dense": None},
            rounds=rounds,
            time_limit=seconds,
            module_path=module_path,
            verbose=False,
            clock=clock,
        )["dense"]
        if not is_changed(profile, now):
            return None
        found = DenseChange(profile.dense_ms, profile.spread[-1], now.milliseconds, now.spread)
    return found


def is_changed(profile: LatencyProfile, now: LatencyStats) -> bool:
    """Whether the dense latency of a profile is off by more than the noise of both sides.

    That is the standard error of both medians and the variation of the speed of the machine, three times, but at least
    5% and at most a half: noise beyond that leaves no profile that could be planned on.

    Args:
        profile: The profile.
        now: The dense model, timed again, in a few runs.
    """
    change = abs(log(now.milliseconds / profile.dense_ms))
    drift = TUNING.unknown_drift if profile.drift is None else profile.drift / NORMAL_QUARTILE
    then_noise = profile.stderr_ms(profile.dense_tokens) / profile.dense_ms
    of_run = profile.spread[-1] / profile.dense_ms if then_noise < inf else 0.0
    # The quartiles of a few runs may be close by chance: no less noise than there was when the profile was measured.
    of_now = max(now.spread / now.milliseconds, of_run)
    now_noise = MEDIAN_STDERR * of_now / NORMAL_QUARTILE / sqrt(now.rounds)
    noise = hypot(then_noise, now_noise, drift)
    return change > min(max(TUNING.sigmas * noise, log(1 + TUNING.min_change)), log(1 + TUNING.max_change))
