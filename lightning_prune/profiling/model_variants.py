"""What a model can be run as: dense, pruned, in 8 bits, or both; and going from one to another between two runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from lightning_prune.patching import PatchHandle, VisionTransformer, unpatch
from lightning_prune.patching.patched_block import without_origin
from lightning_prune.profiling.interleaved_timer import InterleavedTimer
from lightning_prune.quantization import Int8Weights
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import KeepRates, Schedule


class Variant(NamedTuple):
    """One way to run a model.

    Attributes:
        reduction: The method, by name or as an instance; None removes no tokens.
        schedule: What it removes; None where there is no method, or the images decide.
        int8: Whether the linear layers of the transformer run in 8 bits.
    """

    reduction: str | Reduction | None = None
    schedule: Schedule | KeepRates | None = None
    int8: bool = False


DENSE = Variant()
"""The model as it is."""


class VariantSwitch:
    """Makes a transformer run as one variant after another; what can be kept from one to the next is kept.

    Args:
        transformer: The Vision Transformer; as it is now is dense.
    """

    def __init__(self, transformer: VisionTransformer) -> None:
        self._transformer = transformer
        self._handles: list[tuple[Reduction, PatchHandle]] = []  # no dict: a method of a user may have no hash
        self._weights: Int8Weights | None = None

    def to(self, variant: Variant) -> None:
        """Makes the transformer run as `variant`.

        Raises:
            ScheduleError, UnsupportedModelError: As `lightning_prune.patch`.
            ArgumentError: If 8 bits are asked for and nothing here can compute them.
        """
        if variant.int8:
            self._weights = self._weights or Int8Weights(self._transformer.root)
            self._weights.put_on()
        elif self._weights is not None:
            self._weights.take_off()
        if variant.reduction is None:
            unpatch(self._transformer.root)
            return
        reduction = resolve(variant.reduction)
        schedule = None if variant.schedule is None else without_origin(variant.schedule)
        for known, handle in self._handles:
            if known == reduction:
                handle.update(schedule)
                return
        self._handles.append((reduction, PatchHandle(self._transformer, reduction, schedule)))

    def off(self) -> None:
        """Makes the transformer dense again, to the bit."""
        try:
            unpatch(self._transformer.root)
        finally:
            if self._weights is not None:
                self._weights.take_off()


@contextmanager
def race_of(transformer: VisionTransformer, example_inputs: Tensor) -> Iterator[InterleavedTimer[Variant]]:
    """Interleaved timing of variants against the dense model, which is restored at the end.

    To be used inside `ready_to_run`.

    Args:
        transformer: The Vision Transformer, dense.
        example_inputs: (B, channels, height, width) images on its device.
    """
    switch = VariantSwitch(transformer)
    try:
        yield InterleavedTimer[Variant](
            prepare=switch.to,
            run=lambda: transformer.runner(example_inputs),
            device=example_inputs.device,
            reference=DENSE,
        )
    finally:
        switch.off()
