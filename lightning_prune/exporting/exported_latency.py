"""How fast an exported model is in its runtime, beside the dense one."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_prune._utils.device import between_runs
from lightning_prune.exporting.export_report import TimedLatency
from lightning_prune.profiling.interleaved_timer import InterleavedTimer
from lightning_prune.runtimes.graph_store import RunGraph

_DENSE, _EXPORTED = "dense", "exported"


def time_exported(
    exported: RunGraph,
    dense: RunGraph | None,
    images: Tensor,
    rounds: int,
    time_limit: float | None,
    context: Mapping[str, Any],
) -> TimedLatency:
    """Times the exported model and the dense one in one interleaved run.

    Args:
        exported: Runs the exported file.
        dense: Runs the dense model in the same runtime; None if the exported model is dense.
        images: (B, C, H, W).
        rounds: Number of measurements of each.
        time_limit: Seconds; one round is completed even after it. None for no limit.
        context: What the latency depends on, of the runtime.
    """
    runs = {_EXPORTED: exported, _DENSE: exported if dense is None else dense}
    current = [_DENSE]
    timer = InterleavedTimer[str](
        prepare=lambda name: current.__setitem__(0, name),
        run=lambda: runs[current[0]](images),
        synchronize=between_runs(images.device),
        reference=_DENSE,
    )
    deadline = float("inf") if time_limit is None else time.perf_counter() + time_limit
    timer.measure([] if dense is None else [_EXPORTED], rounds, deadline)
    reference = timer.result(_DENSE)
    found = reference if dense is None else timer.result(_EXPORTED)
    speedup = 1 / found.ratio
    stderr = speedup * found.ratio_stderr / found.ratio  # the relative error of a ratio is that of its inverse
    return TimedLatency(reference.milliseconds, found.milliseconds, speedup, stderr, found.rounds, dict(context))
