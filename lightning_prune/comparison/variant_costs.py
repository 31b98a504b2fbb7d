"""What variants cost besides time: multiply-accumulates, memory and energy."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_prune._utils.progress import progress_bar
from lightning_prune.comparison.planned_variants import PlannedVariant, variant_of
from lightning_prune.comparison.requests import VariantRequest
from lightning_prune.errors import DataError
from lightning_prune.patching import VisionTransformer
from lightning_prune.profiling import Unavailable, VariantSwitch, find_counter, measure_energy
from lightning_prune.profiling.energy_counter import NO_COUNTER
from lightning_prune.profiling.model_cost import ModelCost, count_model_cost
from lightning_prune.profiling.model_variants import Variant


def with_model_costs(
    transformer: VisionTransformer,
    images: Tensor,
    planned: Sequence[PlannedVariant],
    requests: Mapping[str, VariantRequest],
) -> list[PlannedVariant]:
    """Counts what a forward pass of each variant costs; not in 8 bits, whose operations have kernels of their own.

    To be used inside `ready_to_run`.

    Args:
        transformer: The Vision Transformer, dense; so it is afterwards.
        images: (B, C, H, W) on its device.
        planned: The variants.
        requests: Name -> request.
    """
    switch, known, found = VariantSwitch(transformer), dict[Variant, ModelCost](), []
    try:
        for each in planned:
            if each.timing is not None and not each.int8:
                variant = variant_of(each, requests[each.request])._replace(runtime=None)
                if variant not in known:
                    switch.to(variant)
                    known[variant] = count_model_cost(transformer, images)
                cost = known[variant]
                each = replace(each, gmacs=cost.gmacs)
                if not requests[each.request].runtime.compiles:  # compiled graphs allocate memory in their own way
                    each = replace(each, peak_memory_mib=cost.peak_memory_mib)
            found.append(each)
    finally:
        switch.off()
    return found


def with_energy(
    transformer: VisionTransformer,
    images: Tensor,
    planned: Sequence[PlannedVariant],
    requests: Mapping[str, VariantRequest],
    progress: bool = True,
) -> tuple[list[PlannedVariant], str]:
    """Measures what an image costs as each variant, in windows of a second or more.

    To be used inside `ready_to_run`.

    Args:
        transformer: The Vision Transformer, dense; so it is afterwards.
        images: (B, channels, height, width) on its device.
        planned: The variants.
        requests: Name -> request.
        progress: Shows a bar on a terminal.

    Returns:
        The variants with their energy, and where that comes from; as they were, and why, where there is no counter.
    """
    counter = find_counter(images.device)
    if isinstance(counter, Unavailable):
        return list(planned), counter.text
    switch, found, idle = VariantSwitch(transformer), [], 0.0
    try:
        with progress_bar("Measuring energy", None, progress) as tick:
            for each in planned:
                if each.timing is not None:
                    switch.to(variant_of(each, requests[each.request]))
                    reading = measure_energy(
                        lambda: transformer.compiled_root(images), len(images), images.device, counter
                    )
                    each = replace(each, joules_per_image=reading.joules_per_image, watts=reading.watts)
                    idle = reading.idle_watts
                    tick()
                found.append(each)
    except DataError as error:  # the counter stands still under load: what it says is no energy
        return list(planned), f"{NO_COUNTER}: {error}"
    finally:
        switch.off()
    return found, f"{counter.name}; the idle device draws {idle:.1f} W"
