"""Simulated devices: latency from a description of tiles and waves, for tests and for devices that are elsewhere."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, cos, exp, isfinite, pi
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.schedule_forms import allocate_schedule, reducing_block, refuse_adaptive
from lightning_prune.profiling.count_search import explore, profile_builder
from lightning_prune.profiling.environment import measurement_context
from lightning_prune.profiling.interleaved_timer import InterleavedTimer
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.measurement import check_measurable, count_tokens, ready_to_run
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import Schedule

_PREFIX = "simulated:"
_KERNELS = 4  # of a block, beside its products and its attention: norms, activation, residuals
_SELECTING = 8  # kernels of a reduction
_PERIOD = 60.0  # seconds in which the machine slows down and recovers
_SPIKE = 2.0  # mean of what a load spike adds, in runs
_HEADS = ("num_heads", "num_attention_heads")  # as timm and torchvision call them, and as Hugging Face does


class Workload(NamedTuple):
    """What a Vision Transformer asks of a device.

    Attributes:
        batch: Images.
        depth: Blocks.
        width: Of a token.
        heads: Of attention.
        attention: (inputs, outputs) of the products with weights in the attention of a block.
        mlp: The same of its MLP.
    """

    batch: int
    depth: int
    width: int
    heads: int
    attention: tuple[tuple[int, int], ...]
    mlp: tuple[tuple[int, int], ...]

    @classmethod
    def plain(cls, batch: int, depth: int = 12, width: int = 384, heads: int = 6) -> "Workload":
        """That of a plain ViT; DeiT-S if nothing else is said."""
        return cls(
            batch, depth, width, heads, ((width, 3 * width), (width, width)), ((width, 4 * width), (4 * width, width))
        )

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], batch: int) -> "Workload":
        """That of real blocks, read from the weights of the first; all are taken to be alike.

        Args:
            blocks: Of a `lightning_prune.patching.VisionTransformer`.
            batch: Images.

        Raises:
            ArgumentError: If the block does not say how many heads it has, or has no weights in its attention or MLP.
        """
        weights = {
            name: (parameter.shape[1], parameter.shape[0])
            for name, parameter in blocks[0].named_parameters()
            if parameter.ndim == 2 and name.endswith("weight")
        }
        attention = tuple(shape for name, shape in weights.items() if re.search("att", name))
        mlp = tuple(shape for name, shape in weights.items() if not re.search("att", name))
        if not attention or not mlp:
            lacking = "MLP" if attention else "attention"
            raise ArgumentError(
                f"A {type(blocks[0]).__name__} has no matrices of weights in its {lacking}, by which to simulate it."
            )
        width = min(inputs for inputs, _ in weights.values())
        known = (getattr(module, name, None) for module in blocks[0].modules() for name in _HEADS)
        heads = next((count for count in known if isinstance(count, int)), None)
        if heads is None:
            raise ArgumentError(
                f"A {type(blocks[0]).__name__} does not say how many heads its attention has, by {' or '.join(_HEADS)}."
            )
        return cls(batch, len(blocks), width, heads, attention, mlp)


def attention_share(work: Workload, tokens: int) -> float:
    """The share of a block's operations that lie in its attention.

    Args:
        work: The model.
        tokens: That enter the block.

    Example:
        >>> from lightning_prune.profiling import Workload
        >>> from lightning_prune.profiling.simulation import attention_share
        >>> round(attention_share(Workload.plain(batch=1, width=384), tokens=197), 2)
        0.39
    """
    attention = sum(inputs * outputs for inputs, outputs in work.attention) + 2 * tokens * work.width
    mlp = sum(inputs * outputs for inputs, outputs in work.mlp)
    return attention / (attention + mlp)


@dataclass(frozen=True)
class SimulatedDevice:
    """Hardware that works in waves: products are cut into tiles, and each multiprocessor computes one at a time.

    The last wave of a product costs as much as a full one however few tiles it has, which is where cliffs come from
    (arXiv 2407.05941, section 3.1); and no kernel takes less time than it takes to launch the next, which is where
    plateaus at small batches come from. Memory, caches and overlap are left out: this is a bench and a sketch of a
    device, not a model of a particular one.

    Args:
        multiprocessors: How many tiles are computed at once.
        tile: Rows and columns of a tile.
        gigaflops: Of one multiprocessor, in 1e9 operations a second.
        launch: Seconds to launch a kernel.
        noise: Standard deviation of the logarithm of a measured time.
        drift: By how much the machine slows down at worst; it does so and recovers within a minute.
        spikes: Share of runs that something else disturbs.
        seed: Of noise and spikes.

    Raises:
        ArgumentError: If a number is out of its range.

    Example:
        >>> from lightning_prune.profiling import SimulatedDevice, Workload
        >>> device = SimulatedDevice(multiprocessors=8, tile=64)
        >>> work = Workload.plain(batch=1)
        >>> device.seconds(work, [129] * 12) > 1.2 * device.seconds(work, [128] * 12)
        True
    """

    multiprocessors: int = 16
    tile: int = 64
    gigaflops: float = 100.0
    launch: float = 5e-6
    noise: float = 0.0
    drift: float = 0.0
    spikes: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for field in fields(self):
            value = getattr(self, field.name)
            kinds, told = ((int,), "a whole number") if field.type is int else ((int, float), "a number")
            self._check(field.name, isinstance(value, kinds) and not isinstance(value, bool), told)
            self._check(field.name, isfinite(value), "finite")
        for name in ("multiprocessors", "tile", "gigaflops"):
            self._check(name, getattr(self, name) > 0, "> 0")
        for name in ("launch", "noise", "drift", "seed"):
            self._check(name, getattr(self, name) >= 0, ">= 0")
        self._check("spikes", 0 <= self.spikes < 1, "in [0, 1)")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ArgumentError(f"`{name}` of a simulated device must be {wanted}, got {getattr(self, name)!r}.")

    @classmethod
    def parse(cls, text: str) -> "SimulatedDevice":
        """A device from words, as the command line takes them: `simulated:multiprocessors=8,tile=64`.

        Raises:
            ArgumentError: If the words are of another form, or name something that a device does not have.
        """
        known = {field.name: field.type for field in fields(cls)}
        found: dict[str, Any] = {}  # whole numbers and others, which the class checks
        if not text.startswith(_PREFIX):
            raise ArgumentError(f"`device` must begin with {_PREFIX!r}, got {text!r}.")
        for pair in filter(None, text.removeprefix(_PREFIX).split(",")):
            name, _, value = pair.partition("=")
            if name not in known:
                raise ArgumentError(f"A simulated device has {', '.join(known)}, but no {name!r}.")
            if name in found:
                raise ArgumentError(f"`{name}` of a simulated device is given twice in {text!r}.")
            whole = known[name] is int
            try:
                found[name] = int(value) if whole else float(value)
            except ValueError:
                kind = "a whole number" if whole else "a number"
                raise ArgumentError(f"`{name}` of a simulated device must be {kind}, got {value!r}.") from None
        return cls(**found)

    def __str__(self) -> str:
        """As `parse` reads it back exactly, without what is as usual."""
        named = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return _PREFIX + ",".join(named)

    def seconds(self, work: Workload, entering: Sequence[int], leaving: Sequence[int] | None = None) -> float:
        """The exact time of all blocks.

        Args:
            work: The model and its batch.
            entering: Tokens that enter each block, and its attention.
            leaving: Tokens that leave its attention, and enter its MLP; the same if None.
        """
        total = 0.0
        for before, after in zip(entering, leaving or entering, strict=True):
            total += sum(self._product(work.batch * before, *shape) for shape in work.attention)
            total += self._attention(work, before) + _KERNELS * self.launch
            total += sum(self._product(work.batch * after, *shape) for shape in work.mlp)
            if after < before:
                total += self._attention(work, before) + _SELECTING * self.launch
        return total

    def _product(self, rows: int, inputs: int, outputs: int) -> float:
        waves = ceil(ceil(rows / self.tile) * ceil(outputs / self.tile) / self.multiprocessors)
        return max(self.launch, waves * 2e-9 * self.tile**2 * inputs / self.gigaflops)

    def _attention(self, work: Workload, tokens: int) -> float:
        waves = ceil(work.batch * work.heads * ceil(tokens / self.tile) / self.multiprocessors)
        return max(self.launch, waves * 4e-9 * self.tile * tokens * work.width / work.heads / self.gigaflops)


class SimulatedClock:
    """The time of a simulated device, which passes only while it computes.

    Args:
        device: Whose noise, drift and spikes every run has.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.now = 0.0
        self._random = np.random.default_rng(device.seed)

    def __call__(self) -> float:
        """Seconds since the beginning."""
        return self.now

    def spend(self, seconds: float) -> None:
        """Lets a run that takes so long in exact terms pass as it would be measured."""
        drifted = seconds * (1 + self.device.drift * (1 - cos(2 * pi * self.now / _PERIOD)) / 2)
        noisy = drifted * exp(self.device.noise * self._random.standard_normal())
        if self._random.random() < self.device.spikes:
            noisy += drifted * self._random.exponential(_SPIKE)
        self.now += noisy


_SPEEDS = (1e-12, 1e12)  # seconds of a run, beyond which a clock stands still or overflows


def simulate_latency(
    model: nn.Module,
    example_inputs: Tensor,
    device: SimulatedDevice,
    *,
    method: str | Reduction = "pomt",
    block: int | float = 0.25,
    time_limit: float = 30.0,
    target: str | None = None,
) -> LatencyProfile:
    """What `lightning_prune.profile_latency` would measure on a simulated device.

    The model runs once, here, to count its tokens; all else is computed.

    Args:
        model: Any module that contains one Vision Transformer, whose blocks are taken to be alike.
        example_inputs: (B, channels, height, width) images, of the size and batch that are simulated.
        device: The simulated device.
        method: The reduction; all are taken to cost the same.
        block: As `profile_latency` takes it.
        time_limit: Time limit on the clock of the simulated device.
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
    if time_limit is None:
        raise ArgumentError("`time_limit` must be a number > 0, got None.")
    check_measurable(transformer, example_inputs, time_limit)
    reduction = resolve(method)
    refuse_adaptive(reduction)
    index = reducing_block(reduction, block, transformer)
    depth, prefix = transformer.depth, transformer.prefix_tokens
    with ready_to_run(transformer):
        n = count_tokens(transformer, example_inputs)
        context = measurement_context(transformer.runner, example_inputs)
    work = Workload.of(transformer.blocks, len(example_inputs))
    lowest = n - reduction.most(n, prefix, depth, index)
    clock = SimulatedClock(device)
    dense = seconds_of(device, work, Schedule([0] * depth), n)
    if not _SPEEDS[0] < dense < _SPEEDS[1]:
        raise ArgumentError(f"`device` must be of a speed that can be computed with; {device} takes {dense} s.")
    counts = range(lowest, n + 1)
    schedules = {count: allocate_schedule(reduction, n - count, n, prefix, depth, index) for count in counts}
    running = [n]
    race = InterleavedTimer[int](
        prepare=lambda count: running.__setitem__(0, count),
        run=lambda: clock.spend(seconds_of(device, work, schedules[running[0]], n, reduction.site)),
        device=torch.device("cpu"),
        reference=n,
        clock=clock,
    )
    build = profile_builder(reduction.name, index, depth, "deployed")
    profile = explore(race, build, None, lowest, n, time_limit, lambda: None, len(example_inputs))
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
