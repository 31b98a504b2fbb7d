"""What a planner asks of the device: one method of one model, timed here."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_prune.profiling import LatencyProfile, Timing, compare_latency, profile_latency, spread_schedule
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule


@dataclass(frozen=True)
class OnDevice:
    """A method of a model on the device that the batch is on.

    Attributes:
        model: The module that contains the Vision Transformer, dense.
        batch: (B, channels, height, width) images on the device.
        reduction: The method.
        block: As `lightning_prune.profiling.reducing_block` says it.
        tokens: N.
        prefix_tokens: P.
        depth: Blocks.
        max_seconds: Time limit of a profile; None is the paper's.
        target: Dotted path of the transformer in `model`.
        progress: Shows bars on a terminal.
    """

    model: nn.Module
    batch: Tensor
    reduction: Reduction
    block: int
    tokens: int
    prefix_tokens: int
    depth: int
    max_seconds: float | None
    target: str | None
    progress: bool

    def schedule(self, count: int) -> Schedule:
        """What leaves so many tokens."""
        remove = self.tokens - count
        return spread_schedule(self.reduction, remove, self.tokens, self.prefix_tokens, self.depth, self.block)

    def measure(self, counts: Sequence[int]) -> LatencyProfile:
        """The latency of these counts and dense, in a run of its own."""
        return profile_latency(
            self.model,
            self.batch,
            method=self.reduction,
            block=self.block,
            counts=counts,
            max_seconds=(self.max_seconds or 30.0) / 8,
            target=self.target,
            progress=self.progress,
        )

    def compare(self, count: int) -> tuple[Timing, Timing]:
        """Dense and a count in one interleaved run."""
        timings = compare_latency(
            self.model,
            self.batch,
            {"dense": None, "pruned": (self.reduction, self.schedule(count))},
            max_seconds=20.0 if self.max_seconds is None else max(1.0, self.max_seconds / 3),
            target=self.target,
            progress=self.progress,
        )
        return timings["dense"], timings["pruned"]
