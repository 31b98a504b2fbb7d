"""The latency profile of a model on a device that is only simulated."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling.context import measurement_context
from lightning_prune.profiling.curve import LatencyProfile
from lightning_prune.profiling.explore import explore, profile_builder
from lightning_prune.profiling.latency import check_measurable, count_tokens, ready_to_run
from lightning_prune.profiling.simulated import SimulatedClock, SimulatedDevice, Workload
from lightning_prune.profiling.spreading import reducing_block, refuse_adaptive, spread_schedule
from lightning_prune.profiling.timing import Interleaved
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import Schedule

_SPEEDS = (1e-12, 1e12)  # seconds of a run, beyond which a clock stands still or overflows


def simulate_latency(
    model: nn.Module,
    example_batch: Tensor,
    device: SimulatedDevice,
    *,
    method: str | Reduction = "pomt",
    block: int | float = 0.25,
    max_seconds: float = 30.0,
    target: str | None = None,
) -> LatencyProfile:
    """What `lightning_prune.profile_latency` would measure on a simulated device.

    The model runs once, here, to count its tokens; all else is computed.

    Args:
        model: Any module that contains one Vision Transformer, whose blocks are taken to be alike.
        example_batch: (B, channels, height, width) images, of the size and batch that are simulated.
        device: The simulated device.
        method: The reduction; all are taken to cost the same.
        block: As `profile_latency` takes it.
        max_seconds: Time limit on the clock of the simulated device.
        target: Dotted path of the transformer in `model`.

    Raises:
        ArgumentError: If an argument is unusable, or the model is patched.
        UnsupportedModelError: As `lightning_prune.patch`.

    Example:
        >>> import timm
        >>> import torch
        >>> from lightning_prune.profiling import SimulatedDevice, simulate_latency
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> profile = simulate_latency(model, torch.randn(1, 3, 224, 224), SimulatedDevice(multiprocessors=9, tile=64))
        >>> [(cliff.above, cliff.below) for cliff in profile.cliffs()]
        [(193, 192), (129, 128), (65, 64)]
    """
    transformer = find_vision_transformer(model, target)
    if not isinstance(device, SimulatedDevice):
        raise ArgumentError(f"`device` must be a SimulatedDevice, got {device!r}.")
    if max_seconds is None:
        raise ArgumentError("`max_seconds` must be a number > 0, got None.")
    check_measurable(transformer, example_batch, max_seconds)
    reduction = resolve(method)
    refuse_adaptive(reduction)
    index = reducing_block(reduction, block, transformer)
    depth, prefix = transformer.depth, transformer.prefix_tokens
    with ready_to_run(transformer):
        n = count_tokens(transformer, example_batch)
        context = measurement_context(transformer.runner, example_batch)
    work = Workload.of(transformer.blocks, len(example_batch))
    lowest = n - reduction.most(n, prefix, depth, index)
    clock = SimulatedClock(device)
    dense = seconds_of(device, work, Schedule([0] * depth), n)
    if not _SPEEDS[0] < dense < _SPEEDS[1]:
        raise ArgumentError(f"`device` must be of a speed that can be computed with; {device} takes {dense} s.")
    counts = range(lowest, n + 1)
    schedules = {count: spread_schedule(reduction, n - count, n, prefix, depth, index) for count in counts}
    running = [n]
    race = Interleaved[int](
        prepare=lambda count: running.__setitem__(0, count),
        run=lambda: clock.spend(seconds_of(device, work, schedules[running[0]], n, reduction.site)),
        device=torch.device("cpu"),
        reference=n,
        clock=clock,
    )
    build = profile_builder(reduction.name, index, depth, "deployed")
    profile = explore(race, build, None, lowest, n, max_seconds, lambda: None, len(example_batch))
    simulated = {"device": str(device), "device_type": "simulated", "threads": 0}
    return replace(profile, seconds=clock.now, context=context | simulated)


def seconds_of(
    device: SimulatedDevice,
    work: Workload,
    schedule: Schedule,
    tokens: int,
    site: Literal["block", "input"] = "block",
) -> float:
    """The exact time of a model with a schedule.

    Args:
        device: The simulated device.
        work: The model and its batch.
        schedule: Tokens that each block removes, between its attention and its MLP; or that go before block 0.
        tokens: N.
        site: Of the reduction. One that acts on the input leaves all blocks the same tokens, and costs nothing in them.
    """
    leaving = schedule.tokens(tokens)
    return device.seconds(work, leaving if site == "input" else (tokens, *leaving[:-1]), leaving)
