"""Whether a latency profile that a user gives is of this model, can be planned on, and is of this device."""

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.schedule_forms import is_multi_block
from lightning_prune.planning.latency_model import removes_before_blocks
from lightning_prune.profiling import LatencyProfile, measurement_context
from lightning_prune.profiling.clocks import clock_name
from lightning_prune.profiling.profile_check import dense_change
from lightning_prune.reduction import resolve

_OF_IMAGES = ("image_shape", "precision")
_BY_BUNDLE = "measured by a bundle"
_CONDITIONS = (
    "device",
    "threads",
    "clock",
    "batch_size",
    "compiled",
    "runtime",
    "provider",
    "runtime_precision",
    *_OF_IMAGES,
)


def foreign_conditions(
    profile: LatencyProfile, transformer: VisionTransformer, example_inputs: Tensor, clock: Callable[[], float]
) -> list[str]:
    """The conditions under which a profile was measured that are not those here, such as `batch_size 1 there, 4 here`.

    Where there is one, the profile cannot be compared with timings made here. Warns of each. The number of threads
    counts on a CPU only. A profile that a bundle measured is always of another device, and only what would be wrong
    there, too, is worth a warning: the size of the images and the precision.

    Args:
        profile: The profile.
        transformer: The Vision Transformer.
        example_inputs: (B, C, H, W) images as they will be used.
        clock: What runs are timed by here.
    """
    here = {**measurement_context(transformer.compiled_root, example_inputs, clock), "clock": clock_name(clock)}
    there = {"clock": "wall"} | {
        key: profile.context[key] for key in _CONDITIONS if profile.context.get(key) is not None
    }
    if here["device_type"] != "cpu" or profile.context.get("device_type") != "cpu":
        there.pop("threads", None)
    differing = {
        key: f"{key} {value} there, {here.get(key)} here" for key, value in there.items() if value != here.get(key)
    }
    is_bundled = "bundle" in profile.context
    for key, difference in differing.items():
        if not is_bundled or key in _OF_IMAGES:
            warnings.warn(f"The profile was measured elsewhere: {difference}.", stacklevel=4)
    if is_bundled and "device" not in differing:  # a device of the same name need not be this one
        return [_BY_BUNDLE, *differing.values()]
    return list(differing.values())


def warn_of_change(
    profile: LatencyProfile, model: nn.Module, example_inputs: Tensor, limit: TimeLimit, module_path: str | None
) -> None:
    """Warns, with both figures, where the dense model does not take what a profile of this device says.

    Args:
        profile: What the user gives.
        model: Contains the transformer, dense.
        example_inputs: (B, C, H, W) images as they will be used.
        limit: Of planning; its clock is used.
        module_path: Dotted path of the transformer in the model.
    """
    change = dense_change(
        profile, model, example_inputs, time_limit=limit.share(1.0), module_path=module_path, clock=limit.clock
    )
    if change is not None:
        warnings.warn(
            f"The profile that was given does not hold any more: the dense model takes {change}. Timings against dense "
            "correct what is planned on it; better measure it again.",
            stacklevel=4,
        )


def check_profile(profile: object, transformer: VisionTransformer, protocol: str) -> None:
    """Raises ArgumentError, with both values, if a profile cannot be planned on.

    Args:
        profile: What the user gives.
        transformer: The Vision Transformer.
        protocol: How it must have been measured.
    """
    if not isinstance(profile, LatencyProfile):
        raise ArgumentError(f"`profile` must be a LatencyProfile, got {profile!r}.")
    root = transformer.outer
    here = {
        "model": original_class(root).__name__,
        "parameters": sum(p.numel() for p in root.parameters()),
        "blocks": transformer.depth,
        "tokens": transformer.num_tokens,
    }
    there = {**profile.context, "blocks": profile.depth, "tokens": profile.dense_tokens}
    for name, value in here.items():
        if value is not None and there.get(name, value) != value:
            raise ArgumentError(
                f"`profile` must be of this model ({name}: {value}), got one of another ({name}: {there[name]})."
            )
    if profile.protocol != protocol:
        raise ArgumentError(f"`profile` must be measured with protocol={protocol!r}, got {profile.protocol!r}.")
    if removes_before_blocks(profile):
        return
    try:
        one_block = not is_multi_block(resolve(profile.method))
    except ArgumentError:
        one_block = False
    if not one_block:
        raise ArgumentError(
            "`profile` must be a latency curve of a method that reduces before block 0 or in one block, got one of "
            f"{profile.method}; `profile_latency(model, example_inputs, method=RandomDrop(site='input'))` measures it."
        )


def nothing_timed(
    reason: str, profile: LatencyProfile, differing: Sequence[str], without_overhead: Sequence[str] = ()
) -> str:
    """The reason of a plan for a device that is not here, or for other conditions on this one.

    Args:
        reason: Of the plan.
        profile: That it was made by.
        differing: The result of `foreign_conditions`.
        without_overhead: Methods whose overhead the profile does not hold.
    """
    of = profile.context.get("device", "another device")
    is_elsewhere = any(difference.startswith("device ") for difference in differing)
    where = f"of {of}" if is_elsewhere else "of other conditions"
    # Of another device, threads and runtime are expected to be others; what runs in a batch is not.
    named = [each for each in differing if not is_elsewhere or each.startswith(("batch_size ", *_OF_IMAGES))]
    where += f" ({'; '.join(named)})" if named else ""
    text = f"{reason} Nothing was timed here: the profile is {where}. The latency is predicted from it, not measured."
    if without_overhead and profile.context.get("device_type") != "simulated":
        text += f" The profile holds no overhead of {', '.join(without_overhead)}, which is taken to be none."
    return text
