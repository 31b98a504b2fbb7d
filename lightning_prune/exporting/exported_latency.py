"""How fast an exported model is in its runtime: next to the dense one, and with its graph in one form or the other."""

import time
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from lightning_prune._utils.device import between_runs
from lightning_prune.errors import ExportError
from lightning_prune.exporting.export_report import GraphChoice, GraphForm, TimedLatency
from lightning_prune.exporting.exported_graph import ExportedCopy, graph_of
from lightning_prune.exporting.formats import ExportFormat
from lightning_prune.profiling.interleaved_timer import LEAST_ROUNDS, OWN_MEMORY, InterleavedTimer, LatencyStats
from lightning_prune.runtimes.graph_store import RunGraph

K = TypeVar("K", bound=str)
_DENSE, _EXPORTED = "dense", "exported"
_FORMS: tuple[GraphForm, GraphForm] = ("native", "portable")


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
        time_limit: Seconds; three rounds are completed even after it. None for no limit.
        context: What the latency depends on, of the runtime.
    """
    runs = {_DENSE: exported if dense is None else dense} | ({} if dense is None else {_EXPORTED: exported})
    timed = _time(runs, images, rounds, time_limit)
    reference, found = timed[_DENSE], timed.get(_EXPORTED, timed[_DENSE])
    speedup = 1 / found.ratio
    stderr = speedup * found.ratio_stderr / found.ratio  # the relative error of a ratio is that of its inverse
    medians, tails = (reference.milliseconds, found.milliseconds), (reference.p90_ms, found.p90_ms)
    return TimedLatency(*medians, speedup, stderr, found.rounds, dict(context), *tails)


def faster_graph(
    model: ExportedCopy, images: Tensor, format: ExportFormat, rounds: int, time_limit: float | None
) -> GraphChoice:
    """Times a model with both forms of its graph in one interleaved run.

    Args:
        model: Patched.
        images: (B, C, H, W), as the model takes them.
        format: Gives the runtime.
        rounds: Number of measurements of each.
        time_limit: Seconds; three rounds are completed even after it. None for no limit.

    Returns:
        The faster one of those that the runtime accepts.

    Raises:
        ExportError: If it accepts none of them; that of the native form.
    """
    runs: dict[GraphForm, RunGraph] = {}
    refused: dict[GraphForm, ExportError] = {}
    for form in _FORMS:
        try:
            runs[form] = format.load_graph(graph_of(model, images, "static", form))
        except ExportError as error:
            refused[form] = error
    if not runs:
        raise refused["native"]
    timed = _time(runs, images, rounds, time_limit)
    times = {form: timed[form].milliseconds if form in timed else None for form in _FORMS}
    form = next(iter(runs))
    if refused:
        (other,) = refused
        reason = f"the {other} one is not accepted: {refused[other]}"
    else:
        ratio = timed["portable"].ratio  # of rounds, free of the drift of the machine
        form = "portable" if ratio < 1 else "native"
        reason = f"the portable one takes {ratio:.3f} (± {timed['portable'].ratio_stderr:.3f}) of the native one"
    return GraphChoice(form, times["native"], times["portable"], reason)


def _time(runs: Mapping[K, RunGraph], images: Tensor, rounds: int, time_limit: float | None) -> dict[K, LatencyStats]:
    """Times graphs in one interleaved run; the first of them is the reference."""
    reference, *others = runs
    current = [reference]
    timer = InterleavedTimer[K](
        prepare=lambda name: current.__setitem__(0, name),
        run=lambda: runs[current[0]](images),
        synchronize=between_runs(images.device),
        reference=reference,
        settle_seconds=OWN_MEMORY,
    )
    deadline = float("inf") if time_limit is None else time.perf_counter() + time_limit
    timer.measure(others, rounds, deadline, min_rounds=min(LEAST_ROUNDS, rounds))
    return {name: timer.result(name) for name in runs}
