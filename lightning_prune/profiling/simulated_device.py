"""A simulated device with known latencies: hardware that works in waves, and the work that a model gives to it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil, isfinite
from typing import Any, NamedTuple

from torch import nn

from lightning_prune.errors import ArgumentError

_PREFIX = "simulated:"
_HEAD_COUNTS = ("num_heads", "num_attention_heads")  # attributes of timm and torchvision, and of Hugging Face
_KERNELS_PER_BLOCK = 4  # besides its matrix products and attention: norms, activation, residuals
_KERNELS_PER_REDUCTION = 8


class Workload(NamedTuple):
    """The work that a Vision Transformer gives to a device.

    Attributes:
        batch: Images.
        depth: Blocks.
        width: Embedding dimension of a token.
        heads: Attention heads.
        attention: (inputs, outputs) of the matrix products with weights in the attention of a block.
        mlp: The same for its MLP.
    """

    batch: int
    depth: int
    width: int
    heads: int
    attention: tuple[tuple[int, int], ...]
    mlp: tuple[tuple[int, int], ...]

    @classmethod
    def plain(cls, batch: int, depth: int = 12, width: int = 384, heads: int = 6) -> "Workload":
        """The workload of a plain ViT; DeiT-S by default."""
        return cls(
            batch, depth, width, heads, ((width, 3 * width), (width, width)), ((width, 4 * width), (4 * width, width))
        )

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], batch: int) -> "Workload":
        """The workload of real blocks, read from the weights of the first; all blocks are assumed to be alike.

        Args:
            blocks: Blocks of a `lightning_prune.patching.VisionTransformer`.
            batch: Images.

        Raises:
            ArgumentError: If the block has no attribute for its number of heads, or no weights in its attention or MLP.
        """
        weights = {
            name: (parameter.shape[1], parameter.shape[0])
            for name, parameter in blocks[0].named_parameters()
            if parameter.ndim == 2 and name.endswith("weight")
        }
        attention = tuple(shape for name, shape in weights.items() if re.search("att", name))
        mlp = tuple(shape for name, shape in weights.items() if not re.search("att", name))
        kind = type(blocks[0]).__name__
        if not attention or not mlp:
            missing = "MLP" if attention else "attention"
            raise ArgumentError(f"A {kind} cannot be simulated: it has no weight matrices in its {missing}.")
        width = min(inputs for inputs, _ in weights.values())
        known = (getattr(module, name, None) for module in blocks[0].modules() for name in _HEAD_COUNTS)
        heads = next((count for count in known if isinstance(count, int)), None)
        if heads is None:
            raise ArgumentError(f"A {kind} cannot be simulated: its attention has no {' or '.join(_HEAD_COUNTS)}.")
        return cls(batch, len(blocks), width, heads, attention, mlp)


def attention_share(work: Workload, tokens: int) -> float:
    """Share of a block's operations that are in its attention.

    Args:
        work: The model.
        tokens: Tokens that enter the block.

    Example:
        >>> from lightning_prune.profiling import Workload
        >>> from lightning_prune.profiling.simulated_device import attention_share
        >>> round(attention_share(Workload.plain(batch=1, width=384), tokens=197), 2)
        0.39
    """
    attention = sum(inputs * outputs for inputs, outputs in work.attention) + 2 * tokens * work.width
    mlp = sum(inputs * outputs for inputs, outputs in work.mlp)
    return attention / (attention + mlp)


@dataclass(frozen=True)
class SimulatedDevice:
    """Hardware that works in waves: matrix products are cut into tiles, and each multiprocessor computes one at a time.

    The last wave of a product takes as long as a full one, however few tiles it has; this causes cliffs
    (arXiv 2407.05941, section 3.1). No kernel is faster than the launch of the next; this causes plateaus at small
    batches. Memory, caches and overlap are left out: this is a test bench, not a model of a particular device.

    Args:
        multiprocessors: Tiles that are computed at once.
        tile: Rows and columns of a tile.
        gigaflops: Speed of one multiprocessor, in 1e9 operations per second.
        launch: Seconds to launch a kernel.
        noise: Standard deviation of the logarithm of a measured time.
        drift: Largest slowdown of the machine, which slows down and recovers within a minute.
        spikes: Share of runs that are disturbed by other load.
        seed: Seed of noise and spikes.

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
            kinds, expected = ((int,), "a whole number") if field.type is int else ((int, float), "a number")
            self._check(field.name, isinstance(value, kinds) and not isinstance(value, bool), expected)
            self._check(field.name, isfinite(value), "finite")
        for name in ("multiprocessors", "tile", "gigaflops"):
            self._check(name, getattr(self, name) > 0, "> 0")
        for name in ("launch", "noise", "drift", "seed"):
            self._check(name, getattr(self, name) >= 0, ">= 0")
        self._check("spikes", 0 <= self.spikes < 1, "in [0, 1)")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ArgumentError(f"`{name}` of a simulated device must be {expected}, got {getattr(self, name)!r}.")

    @classmethod
    def parse(cls, text: str) -> "SimulatedDevice":
        """Reads a device as the command line takes it: `simulated:multiprocessors=8,tile=64`.

        Raises:
            ArgumentError: If the text has another form, or an unknown or repeated entry.
        """
        known = {field.name: field.type for field in fields(cls)}
        values: dict[str, Any] = {}
        if not text.startswith(_PREFIX):
            raise ArgumentError(f"`device` must begin with {_PREFIX!r}, got {text!r}.")
        for pair in filter(None, text.removeprefix(_PREFIX).split(",")):
            name, _, value = pair.partition("=")
            if name not in known:
                raise ArgumentError(f"An entry of a simulated device must be one of {', '.join(known)}, got {name!r}.")
            if name in values:
                raise ArgumentError(f"`{name}` of a simulated device must be given once, got {text!r}.")
            integer = known[name] is int
            try:
                values[name] = int(value) if integer else float(value)
            except ValueError:
                kind = "a whole number" if integer else "a number"
                raise ArgumentError(f"`{name}` of a simulated device must be {kind}, got {value!r}.") from None
        return cls(**values)

    def __str__(self) -> str:
        """The entries that differ from the defaults, as `parse` reads them."""
        named = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return _PREFIX + ",".join(named)

    def seconds(self, work: Workload, entering: Sequence[int], leaving: Sequence[int] | None = None) -> float:
        """The exact time of all blocks.

        Args:
            work: The model and its batch.
            entering: Tokens that enter the attention of each block.
            leaving: Tokens that leave the attention of each block and enter its MLP; None for the same.
        """
        total = 0.0
        for before, after in zip(entering, leaving or entering, strict=True):
            total += sum(self._product(work.batch * before, *shape) for shape in work.attention)
            total += self._attention(work, before) + _KERNELS_PER_BLOCK * self.launch
            total += sum(self._product(work.batch * after, *shape) for shape in work.mlp)
            if after < before:
                total += self._attention(work, before) + _KERNELS_PER_REDUCTION * self.launch
        return total

    def _product(self, rows: int, inputs: int, outputs: int) -> float:
        waves = ceil(ceil(rows / self.tile) * ceil(outputs / self.tile) / self.multiprocessors)
        return max(self.launch, waves * 2e-9 * self.tile**2 * inputs / self.gigaflops)

    def _attention(self, work: Workload, tokens: int) -> float:
        waves = ceil(work.batch * work.heads * ceil(tokens / self.tile) / self.multiprocessors)
        return max(self.launch, waves * 4e-9 * self.tile * tokens * work.width / work.heads / self.gigaflops)
