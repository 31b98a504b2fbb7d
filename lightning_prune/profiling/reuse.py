"""A latency profile, from the store where it was measured before."""

from typing import NamedTuple

from torch import Tensor, nn

from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling.curve import LatencyProfile
from lightning_prune.profiling.dependencies import profile_dependencies
from lightning_prune.profiling.latency import Protocol, check_measurable, profile_latency
from lightning_prune.profiling.spreading import reducing_block
from lightning_prune.profiling.store import ProfileStore
from lightning_prune.reduction import Reduction


class Found(NamedTuple):
    """A profile and where it is from.

    Attributes:
        profile: The latency curve.
        reused: Whether it was measured before, and only read now.
    """

    profile: LatencyProfile
    reused: bool


def measured_or_stored(
    model: nn.Module,
    example_batch: Tensor,
    store: ProfileStore | None,
    *,
    method: Reduction,
    block: int | float = 0.25,
    protocol: Protocol = "deployed",
    max_seconds: float | None = 30.0,
    refresh: bool = False,
    target: str | None = None,
    progress: bool = True,
) -> Found:
    """As `lightning_prune.profile_latency`, unless the store holds a profile of just this; a new one is put there.

    A profile that is too noisy to tell whether anything is gained is not kept: the machine was busy.

    Args:
        model: Any module that contains one Vision Transformer.
        example_batch: As `profile_latency` takes it.
        store: Where profiles are kept; None measures.
        method: The reduction.
        block: As `profile_latency` takes it.
        protocol: As `profile_latency` takes it.
        max_seconds: Time limit of measuring; a stored profile that was given less is not reused, unless it was settled
            before its time was up.
        refresh: Measures anew, and replaces what is stored unless that says more.
        target: Dotted path of the transformer in `model`.
        progress: Shows a bar on a terminal.

    Raises:
        ArgumentError: As `profile_latency`, also where a profile is stored.
        UnsupportedModelError: As `lightning_prune.patch`.
    """
    transformer = find_vision_transformer(model, target)
    check_measurable(transformer, example_batch, max_seconds, protocol)
    dependencies = None
    if store is not None:
        index = reducing_block(method, block, transformer)
        dependencies = profile_dependencies(transformer, example_batch, method, index, protocol)
        stored = None if refresh else store.get(dependencies, max_seconds)
        if stored is not None:
            return Found(stored, reused=True)
    profile = profile_latency(
        model,
        example_batch,
        method=method,
        block=block,
        protocol=protocol,
        max_seconds=max_seconds,
        target=target,
        progress=progress,
    )
    if store is not None and dependencies is not None and not profile.doubtful:
        store.put(dependencies, profile, max_seconds)
    return Found(profile, reused=False)
