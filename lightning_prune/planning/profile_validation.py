"""A profile that a user gives: whether it is of this model, and whether of this device."""

import warnings

from torch import Tensor

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.class_swap import original_class
from lightning_prune.profiling import LatencyProfile, measurement_context
from lightning_prune.reduction import Reduction

_CONDITIONS = ("device", "threads", "batch_size", "image_shape", "precision", "compiled")


def is_other_environment(profile: LatencyProfile, transformer: VisionTransformer, example_inputs: Tensor) -> bool:
    """Whether a profile was measured under other conditions, so that nothing that is timed here belongs on its curve.

    Each condition that differs is named in a warning. Threads count on a CPU only.

    Args:
        profile: What the user gives.
        transformer: The Vision Transformer.
        example_inputs: (B, channels, height, width) images as they will be used.
    """
    here = measurement_context(transformer.runner, example_inputs)
    told = {key: profile.context[key] for key in _CONDITIONS if profile.context.get(key) is not None}
    if here["device_type"] != "cpu" or profile.context.get("device_type") != "cpu":
        told.pop("threads", None)
    differing = [key for key, there in told.items() if there != here[key]]
    for key in differing:
        warnings.warn(f"The profile was measured elsewhere: {key} {told[key]} there, {here[key]} here.", stacklevel=4)
    return bool(differing)


def check_profile(
    profile: LatencyProfile,
    transformer: VisionTransformer,
    reduction: Reduction,
    block: int,
    protocol: str,
    hint: str = "",
) -> None:
    """Raises ArgumentError, with both values, if a profile is of another model, method or protocol.

    Args:
        profile: What the user gives.
        transformer: The Vision Transformer.
        reduction: The method that it must be of.
        block: Its block.
        protocol: How it must have been measured.
        hint: How to come by the right one, added where it is of another method.
    """
    if not isinstance(profile, LatencyProfile):
        raise ArgumentError(f"`profile` must be a LatencyProfile, got {profile!r}.")
    _check_model(profile, transformer)
    if profile.depth != transformer.depth:
        raise ArgumentError(f"`profile` is of a model with {profile.depth} blocks; this one has {transformer.depth}.")
    if transformer.tokens is not None and profile.dense_tokens != transformer.tokens:
        raise ArgumentError(f"`profile` is of {profile.dense_tokens} tokens; this model has {transformer.tokens}.")
    if profile.protocol != protocol:
        raise ArgumentError(f"`profile` was measured by protocol {profile.protocol!r}, not {protocol!r}.")
    if protocol != "deployed":
        return
    if (profile.method, profile.block) != (reduction.name, block):
        raise ArgumentError(
            f"`profile` is of {profile.method} at block {profile.block}; "
            f"asked for is {reduction.name} at block {block}. {hint}".rstrip()
        )
    here = {key: repr(value) for key, value in reduction.settings().items()}
    there = profile.context.get("method_settings", here)
    if there != here:
        told = ", ".join(f"{key}={value}" for key, value in there.items())
        raise ArgumentError(
            f"`profile` is of {profile.method} with {told}; asked for is {reduction!r}. {hint}".rstrip()
        )


def _check_model(profile: LatencyProfile, transformer: VisionTransformer) -> None:
    """By what profiles say of their models, where they do."""
    root = transformer.root
    here = {"model": original_class(root).__name__, "parameters": sum(p.numel() for p in root.parameters())}
    for key, value in here.items():
        there = profile.context.get(key, value)
        if there != value:
            kind = "of a model with {} parameters; this one has {}" if key == "parameters" else "of a {}; this is a {}"
            raise ArgumentError(f"`profile` is {kind.format(there, value)}.")


def nothing_timed(reason: str, profile: LatencyProfile) -> str:
    """The reason of a plan for a device that is not here."""
    return f"{reason} Nothing was timed here: the profile is of {profile.context.get('device', 'another device')}."
