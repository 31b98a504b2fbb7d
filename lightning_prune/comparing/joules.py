"""The energy column: joules per image and watts of every variant, where the device counts them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_prune.comparing.entries import Entry
from lightning_prune.comparing.planned import Planned, variant_of
from lightning_prune.errors import DataError
from lightning_prune.patching import VisionTransformer
from lightning_prune.profiling import VariantSwitch
from lightning_prune.profiling.energy import NO_COUNTER, Unavailable, find_counter, measure_energy
from lightning_prune.progress import ticking


def with_energy(
    transformer: VisionTransformer,
    images: Tensor,
    rows: Sequence[Planned],
    entries: Mapping[str, Entry],
    progress: bool = True,
) -> tuple[list[Planned], str]:
    """Measures what an image costs as each variant, in windows of a second or more.

    To be used inside `ready_to_run`.

    Args:
        transformer: The Vision Transformer, dense; so it is afterwards.
        images: (B, channels, height, width) on its device.
        rows: The variants.
        entries: Name -> entry.
        progress: Shows a bar on a terminal.

    Returns:
        The variants with their energy, and where that comes from; as they were, and why, where there is no counter.
    """
    counter = find_counter(images.device)
    if isinstance(counter, Unavailable):
        return list(rows), counter.text
    switch, found, idle = VariantSwitch(transformer), [], 0.0
    try:
        with ticking("Measuring energy", None, progress) as tick:
            for row in rows:
                if row.timing is not None:
                    switch.to(variant_of(row, entries[row.entry]))
                    reading = measure_energy(lambda: transformer.runner(images), len(images), images.device, counter)
                    row = replace(row, joules_per_image=reading.joules_per_image, watts=reading.watts)
                    idle = reading.idle_watts
                    tick()
                found.append(row)
    except DataError as error:  # the counter stands still under load: what it says is no energy
        return list(rows), f"{NO_COUNTER}: {error}"
    finally:
        switch.off()
    return found, f"{counter.name}; the idle device draws {idle:.1f} W"
