"""Latency on a simulated device: a test bench of profiling, and a stand-in for a device not at hand."""

from dataclasses import dataclass, replace
from math import cos, exp, pi
from typing import Literal

import numpy as np
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.schedule_forms import allocate_schedule, reducing_block, refuse_adaptive
from lightning_prune.profiling.count_search import profile_builder, search_counts
from lightning_prune.profiling.environment import measurement_context
from lightning_prune.profiling.interleaved_timer import InterleavedTimer
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.measurement import TOKEN_CURVE, check_measurable, ready_to_run
from lightning_prune.profiling.simulated_device import SimulatedDevice, Workload
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class _Machine:
    """How the speed of the simulated device varies, and the durations that its clock can show.

    Attributes:
        drift_period_s: Seconds in which the machine slows down and recovers.
        spike_runs: Mean length of a load spike, in runs.
        min_run_s: Shortest dense run; a clock would stand still below.
        max_run_s: Longest dense run; a clock would overflow above.
    """

    drift_period_s: float = 60.0
    spike_runs: float = 2.0
    min_run_s: float = 1e-12
    max_run_s: float = 1e12


_MACHINE = _Machine()


class SimulatedClock:
    """The time of a simulated device; it passes only while the device computes.

    Args:
        device: Every run has its noise, drift and spikes.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.now = 0.0
        self._random = np.random.default_rng(device.seed)

    def __call__(self) -> float:
        """Seconds since the beginning."""
        return self.now

    def spend(self, seconds: float) -> None:
        """Advances the clock by a run of this exact duration, as it would be measured."""
        phase = 2 * pi * self.now / _MACHINE.drift_period_s
        drifted = seconds * (1 + self.device.drift * (1 - cos(phase)) / 2)
        noisy = drifted * exp(self.device.noise * self._random.standard_normal())
        if self._random.random() < self.device.spikes:
            noisy += drifted * self._random.exponential(_MACHINE.spike_runs)
        self.now += noisy


def simulate_latency(
    model: nn.Module,
    example_inputs: Tensor,
    device: SimulatedDevice,
    *,
    method: str | Reduction = TOKEN_CURVE,
    block: int | float = 0.25,
    time_limit: float = 30.0,
    module_path: str | None = None,
) -> LatencyProfile:
    """Returns what `lightning_prune.profile_latency` would measure on a simulated device.

    The model runs once, on the real device, to count its tokens. Everything else is computed.

    Args:
        model: Any module that contains one Vision Transformer, whose blocks are assumed to be alike.
        example_inputs: (B, C, H, W) images, of the size and batch that are simulated.
        device: The simulated device.
        method: The reduction, as in `profile_latency`; all have the same overhead.
        block: As in `profile_latency`.
        time_limit: Seconds on the clock of the simulated device.
        module_path: Dotted path of the transformer in `model`.

    Raises:
        ArgumentError: If an argument is unusable, or the model is patched.
        UnsupportedModelError: As `lightning_prune.patch`.

    Example:
        >>> import timm
        >>> import torch
        >>> from lightning_prune.profiling import SimulatedDevice, simulate_latency
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> profile = simulate_latency(
        ...     model, torch.randn(1, 3, 224, 224), SimulatedDevice(multiprocessors=9, tile=64), method="pomt"
        ... )
        >>> [(cliff.above, cliff.below) for cliff in profile.cliffs()]
        [(193, 192), (129, 128), (65, 64)]
    """
    transformer = find_vision_transformer(model, module_path)
    if not isinstance(device, SimulatedDevice):
        raise ArgumentError(f"`device` must be a SimulatedDevice, got {device!r}.")
    if time_limit is None:
        raise ArgumentError("`time_limit` must be a number > 0, got None.")
    check_measurable(transformer, example_inputs, time_limit)
    reduction = resolve(method)
    refuse_adaptive(reduction)
    index = reducing_block(reduction, block, transformer)
    depth, prefix = transformer.depth, transformer.num_prefix_tokens
    with ready_to_run(transformer):
        n = transformer.count_tokens(example_inputs)
        context = measurement_context(transformer.compiled_root, example_inputs)
    work = Workload.of(transformer.blocks, len(example_inputs))
    lowest = n - reduction.max_total_removed(n, prefix, depth, index)
    clock = SimulatedClock(device)
    dense = simulated_seconds(device, work, Schedule([0] * depth), n)
    if not _MACHINE.min_run_s < dense < _MACHINE.max_run_s:
        raise ArgumentError(
            f"`device` must run the model in {_MACHINE.min_run_s:g} to {_MACHINE.max_run_s:g} s, got {dense:g} s by "
            f"{device}."
        )
    possible = reduction.possible_counts(n, prefix, transformer.grid(example_inputs))
    counts = range(lowest, n + 1) if possible is None else [*possible, n]
    schedules = {count: allocate_schedule(reduction, n - count, n, prefix, depth, index) for count in counts}
    current = [n]
    timer = InterleavedTimer[int](
        prepare=lambda count: current.__setitem__(0, count),
        run=lambda: clock.spend(simulated_seconds(device, work, schedules[current[0]], n, reduction.site)),
        synchronize=lambda: None,
        reference=n,
        clock=clock,
    )
    build = profile_builder(reduction.name, index, depth, "deployed")
    profile = search_counts(timer, build, None, lowest, n, time_limit, lambda: None, len(example_inputs), possible)
    simulated = {"device": str(device), "device_type": "simulated", "threads": 0}
    return replace(profile, seconds=clock.now, context=context | simulated)


def simulated_seconds(
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
        schedule: Tokens that each block removes between its attention and its MLP, or that are removed before block 0.
        tokens: N.
        site: Where the reduction acts. On the input, all blocks have the same tokens and none has any overhead.
    """
    leaving = schedule.tokens(tokens)
    return device.seconds(work, leaving if site == "input" else (tokens, *leaving[:-1]), leaving)
