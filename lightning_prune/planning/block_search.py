"""What planning over blocks measures: prices, sensitivities, proxies and, in the end, a few schedules for real."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.planning.labels import labels_of
from lightning_prune.planning.latency_model import LatencyModel
from lightning_prune.planning.levels import search_levels
from lightning_prune.planning.method_front import MethodFront
from lightning_prune.planning.prices import probes
from lightning_prune.planning.sensitivity import Sensitivity
from lightning_prune.profiling import LatencyProfile, Proxy, Timing, Workload, compare_latency
from lightning_prune.profiling.latency import ready_to_run
from lightning_prune.profiling.simulated import attention_share
from lightning_prune.progress import ticking
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

_COUNTS = 8  # at which the sensitivity of a block is measured
_IMAGES = 32  # in one pass, at most
_FIRST = 8  # in the first pass of the sensitivity, whatever time it takes

Variants = dict[str, tuple[str | Reduction, Schedule] | None]


@dataclass
class BlockSearch:
    """One model on one device, asked about methods and schedules.

    Attributes:
        model: The module that contains the transformer, dense.
        transformer: The Vision Transformer.
        images: (images, channels, height, width) calibration images.
        batch: (B, channels, height, width) images on the device.
        curve: Latency where all tokens go before block 0.
        foreign: Whether that curve is of another device, so that nothing can be timed here.
        max_seconds: Time limit of each measurement.
        target: Dotted path of the transformer in the model.
        progress: Shows bars on a terminal.
        seen: How many images the sensitivities were measured on.
        seconds: How long that took.
        dense_ms: Latency of the unpruned model when it was timed last.
    """

    model: nn.Module
    transformer: VisionTransformer
    images: Tensor
    batch: Tensor
    curve: LatencyProfile
    foreign: bool
    max_seconds: float
    target: str | None
    progress: bool
    seen: int = 0
    seconds: float = 0.0
    dense_ms: float = field(init=False)

    def __post_init__(self) -> None:
        """Runs the dense model, with whose outputs all others are compared."""
        self.dense_ms = self.curve.dense_ms
        size = max(len(self.batch), _IMAGES)
        with ready_to_run(self.transformer), ticking("Running the dense model", None, self.progress) as tick:
            self.proxy = Proxy(self.transformer, self.images, self.batch.device, size, None, tick)

    def accuracy(self, reduction: Reduction, schedule: Schedule) -> float:
        """The proxy of a schedule, relative to dense."""
        with (
            ready_to_run(self.transformer),
            ticking(f"Accuracy of {reduction.name}", None, self.progress),
            PatchHandle(self.transformer, reduction, schedule),
        ):
            return self.proxy.measure()

    def compare(self, variants: Variants, max_seconds: float | None = None) -> Mapping[str, Timing]:
        """Timings of variants, dense among them, in one interleaved run; within a third of the limit if not said."""
        limit = max(1.0, self.max_seconds / 3) if max_seconds is None else max_seconds
        timings = compare_latency(
            self.model, self.batch, variants, max_seconds=limit, target=self.target, progress=self.progress
        )
        self.dense_ms = timings["dense"].milliseconds
        return timings

    def fronts(self, reductions: Sequence[Reduction]) -> list[MethodFront]:
        """The front of every method: all schedules that none of its own beats; where the device gains nothing, dense.

        Raises:
            ArgumentError: If two methods are the same.
        """
        labels = labels_of(reductions)
        prefix, depth = self.transformer.prefix_tokens, self.transformer.depth
        share = attention_share(Workload.of(self.transformer.blocks, len(self.batch)), self.curve.dense_tokens)
        latency = LatencyModel.from_profile(self.curve, share, search_levels(self.curve))
        levels = [int(level) for level in latency.levels]
        gains = len(levels) > 1
        timings = self._probed(labels) if gains and not self.foreign else {}
        tables = self._sensitivities(labels) if gains else {}
        fronts = []
        for reduction, label in labels.items():
            costs = np.zeros((depth, 1, 1))
            if gains:
                costs = tables[reduction].costs(levels, depth, partial(reduction.capacity, prefix_tokens=prefix))
            probed = timings.get(reduction, [])
            fronts.append(MethodFront(reduction, label, latency, costs, self.accuracy, self.proxy.name, probed))
        return fronts

    def _probed(self, labels: Mapping[Reduction, str]) -> dict[Reduction, list[tuple[Schedule, Timing]]]:
        """A few schedules of every method, timed in one run, from which follows what it costs besides the tokens."""
        n, depth, prefix = self.curve.dense_tokens, self.transformer.depth, self.transformer.prefix_tokens
        tried = {reduction: probes(reduction, n, prefix, depth, self.transformer.first) for reduction in labels}
        variants: Variants = {"dense": None}
        for reduction, schedules in tried.items():
            variants |= {f"{labels[reduction]} {name}": (reduction, schedule) for name, schedule in schedules.items()}
        timings = self.compare(variants, self.max_seconds)
        return {
            reduction: [(schedule, timings[f"{labels[reduction]} {name}"]) for name, schedule in schedules.items()]
            for reduction, schedules in tried.items()
        }

    def _sensitivities(self, labels: Mapping[Reduction, str]) -> dict[Reduction, Sensitivity]:
        """Of every method, on the same images: as many as the time allows, the first few in any case.

        All methods go through a batch before any sees the next, and how large that is follows from how long the last
        one took.
        """
        transformer, began = self.transformer, time.perf_counter()
        deadline = began + self.max_seconds * len(labels)
        tables = {reduction: self._sensitivity(reduction) for reduction in labels}
        weight = next((p for p in transformer.root.parameters() if p.is_floating_point()), self.images)
        dtype = self.images.dtype if torch.is_autocast_enabled(self.batch.device.type) else weight.dtype
        told = f"Sensitivity of the blocks to {', '.join(labels.values())}"
        seen, size = 0, _FIRST
        with ready_to_run(transformer), ticking(told, self.max_seconds * len(labels), self.progress) as tick:
            while size and seen < len(self.images):
                started = time.perf_counter()
                images = self.images[seen : seen + size].to(self.batch.device, dtype)
                for table in tables.values():
                    table.add(images, tick)
                seen += len(images)
                now = time.perf_counter()
                fits = len(images) * max(deadline - now, 0.0) / max(now - started, 1e-9)
                size = int(min(fits, _IMAGES)) // _FIRST * _FIRST
        self.seen, self.seconds = seen, time.perf_counter() - began
        return tables

    def _sensitivity(self, reduction: Reduction) -> Sensitivity:
        n, transformer = self.curve.dense_tokens, self.transformer
        least = max(n - reduction.capacity(n, transformer.prefix_tokens), n // 10)
        counts = np.linspace(least, n, _COUNTS + 1).round().astype(int).tolist()
        return Sensitivity(transformer, reduction, range(transformer.first, transformer.depth), counts, n)
