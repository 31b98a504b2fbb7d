"""Variants of one model (dense, pruned, with other weights), and switching from one to another between two runs."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from lightning_prune._utils.device import between_runs
from lightning_prune.patching import PatchHandle, VisionTransformer, unpatch
from lightning_prune.patching.exact_tail import EXACT
from lightning_prune.profiling.interleaved_timer import OWN_MEMORY, OWN_THREADS, InterleavedTimer
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.runtimes.base import Runtime, applied_runtime
from lightning_prune.runtimes.switch import RuntimeSwitch
from lightning_prune.schedule import KeepRates, Schedule


class WeightTransform(Protocol):
    """Other weights for a module, which can replace its own between two runs."""

    def apply(self) -> None:
        """Gives the module the other weights; does nothing where it has them."""
        ...

    def remove(self) -> None:
        """Gives the module its own weights back, to the bit; does nothing where it has them."""
        ...


class Variant(NamedTuple):
    """One way to run a model.

    Attributes:
        reduction: The method, by name or as an instance; None for those that the schedule names, one for each block.
            `"exact"` for the exact tail without a method.
        schedule: The tokens to remove; None where the images decide. Without a reduction and a schedule no tokens are
            removed.
        weights: Makes the weights to run with, such as `lightning_prune.quantization.Int8Weights`; None keeps the
            model's own.
        runtime: What executes the model; None keeps the runtime that is applied to it.
        tail: Whether it has the exact tail, as of `lightning_prune.patch`. False where blocks are compared.
    """

    reduction: str | Reduction | None = None
    schedule: Schedule | KeepRates | None = None
    weights: Callable[[nn.Module], WeightTransform] | None = None
    runtime: Runtime | None = None
    tail: bool | None = None


DENSE = Variant()
"""The model as it is."""


class VariantSwitch:
    """Makes a transformer run as one variant after another; patches and transformed weights are made once and reused.

    Args:
        transformer: The Vision Transformer; its present state is dense.
    """

    def __init__(self, transformer: VisionTransformer) -> None:
        self._transformer = transformer
        # Not a dict: a user's method may not be hashable.
        self._handles: list[tuple[Reduction | str | None, bool | None, PatchHandle]] = []
        self._transforms: dict[Callable[[nn.Module], WeightTransform], WeightTransform] = {}
        self._runtimes = RuntimeSwitch(transformer)

    def to(self, variant: Variant) -> None:
        """Makes the transformer run as `variant`.

        Raises:
            ScheduleError: As `lightning_prune.patch`.
            UnsupportedModelError: As `lightning_prune.patch`.
            ArgumentError: If this device cannot run the weights, no method is named, or another runtime is applied to
                the transformer.
        """
        self._remove_weights(keep=variant.weights)  # before another runtime is installed, which looks at them
        if variant.runtime is not None:
            self._runtimes.to(variant.runtime)
        self._apply_weights(variant.weights)
        schedule = variant.schedule
        if variant.reduction is None and schedule is None:
            unpatch(self._transformer.root)
            return
        is_exact = variant.reduction == EXACT
        reduction = variant.reduction if is_exact or variant.reduction is None else resolve(variant.reduction)
        for known, tail, handle in self._handles:
            if known == reduction and tail is variant.tail:
                handle.update(schedule)
                return
        method = reduction if isinstance(reduction, Reduction) else None
        handle = PatchHandle(self._transformer, method, schedule, tail=variant.tail, exact=is_exact)
        self._handles.append((reduction, variant.tail, handle))

    def off(self) -> None:
        """Makes the transformer dense again, to the bit."""
        try:
            unpatch(self._transformer.root)
        finally:
            self._runtimes.off()
            self._remove_weights(keep=None)

    def _remove_weights(self, keep: Callable[[nn.Module], WeightTransform] | None) -> None:
        for known, transform in self._transforms.items():
            if known != keep:
                transform.remove()

    def _apply_weights(self, factory: Callable[[nn.Module], WeightTransform] | None) -> None:
        if factory is not None:
            if factory not in self._transforms:
                self._transforms[factory] = factory(self._transformer.root)
            self._transforms[factory].apply()


def settle_seconds(runtimes: Iterable[Runtime | None]) -> float | None:
    """The `settle_seconds` of an `InterleavedTimer` whose alternatives run in these runtimes.

    Converted graphs have a copy of the weights each, and runtimes have threads of their own.

    Args:
        runtimes: The runtimes; None is PyTorch.

    Example:
        >>> from lightning_prune.profiling.model_variants import settle_seconds
        >>> from lightning_prune.runtimes import parse_runtime
        >>> onnx = parse_runtime("onnxruntime")
        >>> settle_seconds([None]), settle_seconds([onnx, onnx]), settle_seconds([None, onnx])
        (None, 0.0, 0.02)
    """
    known = {*runtimes}
    if not any(runtime is not None and runtime.converts for runtime in known):
        return None
    return OWN_MEMORY if len(known) == 1 else OWN_THREADS


@contextmanager
def variant_timer(
    transformer: VisionTransformer,
    example_inputs: Tensor,
    clock: Callable[[], float] = time.perf_counter,
    reference: Variant = DENSE,
    runtimes: Sequence[Runtime] = (),
) -> Iterator[InterleavedTimer[Variant]]:
    """Interleaved timing of variants against the dense model, which is restored at the end.

    Use it inside `lightning_prune.profiling.measurement.ready_to_run`.

    Args:
        transformer: The Vision Transformer, dense.
        example_inputs: (B, C, H, W) images on its device.
        clock: Returns seconds.
        reference: The dense model, in the runtime that variants are compared with.
        runtimes: Others in which variants run.
    """
    switch = VariantSwitch(transformer)
    try:
        yield InterleavedTimer[Variant](
            prepare=switch.to,
            run=lambda: transformer.run(example_inputs),
            synchronize=between_runs(example_inputs.device),
            reference=reference,
            clock=clock,
            settle_seconds=settle_seconds([reference.runtime or applied_runtime(transformer), *runtimes]),
        )
    finally:
        switch.off()
