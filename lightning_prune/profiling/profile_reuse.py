"""A latency profile that is read from the store where it still holds, and measured otherwise."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.schedule_forms import reducing_block
from lightning_prune.profiling.clocks import read_clock
from lightning_prune.profiling.environment import profile_dependencies, unknown_conditions
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.measurement import TOKEN_CURVE, ProfilingMode, check_measurable, profile_latency
from lightning_prune.profiling.profile_check import dense_change
from lightning_prune.profiling.profile_store import ProfileStore
from lightning_prune.reduction import Reduction


class CachedProfile(NamedTuple):
    """A profile and where it is from.

    Attributes:
        profile: The latency profile.
        reused: Whether it was read from the store and not measured.
    """

    profile: LatencyProfile
    reused: bool


def holds(
    profile: LatencyProfile,
    model: nn.Module,
    example_inputs: Tensor,
    *,
    time_limit: float | None,
    module_path: str | None,
    clock: Callable[[], float],
) -> bool:
    """Whether a profile of an earlier run still holds; a warning with both latencies says it where it does not.

    Args:
        profile: Of exactly the conditions of now.
        model: Any module that contains one Vision Transformer, dense.
        example_inputs: (B, C, H, W) images on the device.
        time_limit: Seconds that measuring a profile would have.
        module_path: Dotted path of the transformer in `model`.
        clock: What runs are timed by.
    """
    change = dense_change(profile, model, example_inputs, time_limit=time_limit, module_path=module_path, clock=clock)
    if change is not None:
        warnings.warn(
            f"The kept latency profile is measured again: the dense model does not take what it says, {change}.",
            stacklevel=3,
        )
    return change is None


def get_or_profile(
    model: nn.Module,
    example_inputs: Tensor,
    store: ProfileStore | None,
    *,
    method: Reduction = TOKEN_CURVE,
    block: int | float = 0.25,
    protocol: ProfilingMode = "deployed",
    time_limit: float | None = 30.0,
    module_path: str | None = None,
    verbose: bool = True,
    clock: str | Callable[[], float] = "wall",
) -> CachedProfile:
    """Returns the kept profile of exactly these conditions, or measures one and keeps it.

    A kept profile is only reused if the dense model takes as long as it did when the profile was measured, within the
    noise of both: it is timed a few times, and a warning says so where it does not. Inconclusive profiles are not kept,
    as the machine was busy. Nor are profiles of a model with an unknown condition, such as one that the user compiled;
    a warning says so.

    Args:
        model: Any module that contains one Vision Transformer.
        example_inputs: (B, C, H, W) images; see `lightning_prune.profile_latency`.
        store: Where profiles are kept; None measures and keeps nothing.
        method: As in `profile_latency`.
        block: As in `profile_latency`.
        protocol: As in `profile_latency`.
        time_limit: Seconds for measuring. A kept profile that had less is not reused, unless it converged.
        module_path: Dotted path of the transformer in `model`.
        verbose: Shows a progress bar on a terminal.
        clock: What runs are timed by, as in `profile_latency`.

    Raises:
        ArgumentError: As `profile_latency`, also where a profile is kept.
        UnsupportedModelError: As `lightning_prune.patch`.
    """
    transformer = find_vision_transformer(model, module_path)
    check_measurable(transformer, example_inputs, time_limit, protocol)
    clock = read_clock(clock, example_inputs.device.type)
    dependencies, kept = None, None
    if store is not None:
        index = reducing_block(method, block, transformer)
        dependencies = profile_dependencies(transformer, example_inputs, method, index, protocol, clock)
        kept = store.get(dependencies, time_limit)
        if kept is not None and holds(
            kept, model, example_inputs, time_limit=time_limit, module_path=module_path, clock=clock
        ):
            return CachedProfile(kept, reused=True)
        unknown = unknown_conditions(dependencies)
        if unknown:
            warnings.warn(
                f"The latency profile is measured every time and not kept: {', '.join(unknown)} cannot be compared "
                "with those of another run.",
                stacklevel=2,
            )
    profile = profile_latency(
        model,
        example_inputs,
        method=method,
        block=block,
        protocol=protocol,
        time_limit=time_limit,
        module_path=module_path,
        verbose=verbose,
        clock=clock,
    )
    if store is not None and dependencies is not None and not profile.is_inconclusive:
        store.put(dependencies, profile, time_limit, replace=kept is not None)
    return CachedProfile(profile, reused=False)
