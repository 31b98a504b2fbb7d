"""Timings from which the overhead of each method follows, before any candidate is timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_prune._utils.device import between_runs
from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.truncation import truncated
from lightning_prune.planning.latency_model import LatencyModel
from lightning_prune.planning.mixed_latency import fit_overhead
from lightning_prune.planning.probed_schedules import PROBES, Methods, schedules_to_probe
from lightning_prune.profiling import InterleavedTimer, LatencyProfile, LatencyStats, Variant, VariantSwitch
from lightning_prune.profiling.latency_profile import OverheadProbe
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_variants import settle_seconds
from lightning_prune.reduction import Reduction, spec_of
from lightning_prune.runtimes.base import Runtime, applied_runtime
from lightning_prune.schedule import Schedule

Probes = dict[str, list[tuple[Schedule, LatencyStats]]]
"""Label of a method -> schedules with their timings."""

SHALLOW_BLOCKS = 3
"""Blocks of the copy after the first that can reduce: one of each kind, that reduces and comes later."""
SHALLOW_PROBES = 2
"""Schedules of a method that are timed in the copy; each has to be converted."""
_ROUNDS = 31
_LEAST_SECONDS = 2.0  # for further rounds, whatever the time limit


def has_shallow_copy(transformer: VisionTransformer) -> bool:
    """Whether a copy with few blocks is much smaller than the whole transformer."""
    return 2 * _shallow_depth(transformer) <= transformer.depth


def uses_shallow_copy(transformer: VisionTransformer, runtime: Runtime | None = None) -> bool:
    """Whether probes run in a copy with few blocks: where every schedule has to be converted, which takes seconds.

    Args:
        transformer: The Vision Transformer.
        runtime: What executes it; the runtime that is applied to it if None.
    """
    runtime = applied_runtime(transformer) if runtime is None else runtime
    return runtime is not None and runtime.converts and has_shallow_copy(transformer)


def shallow_copy(transformer: VisionTransformer) -> VisionTransformer:
    """A copy with few blocks, in which the overheads of methods are measured; it shares all weights.

    Args:
        transformer: Dense.

    Raises:
        UnsupportedModelError: If no such copy can be made.
    """
    return truncated(transformer, _shallow_depth(transformer))


def _shallow_depth(transformer: VisionTransformer) -> int:
    return transformer.first_prunable_block + SHALLOW_BLOCKS + 1


def shallow_schedules(shallow: VisionTransformer, methods: Methods, dense_tokens: int) -> dict[str, list[Schedule]]:
    """Some schedules of every method for the copy with few blocks.

    Args:
        shallow: The copy.
        methods: Label -> the method and the blocks that may reduce; of these, only whether it acts before block 0
            matters here.
        dense_tokens: N.
    """
    blocks = range(shallow.first_prunable_block, shallow.depth)
    own = {
        label: (reduction, (0,) if reduction.site == "input" else blocks) for label, (reduction, _) in methods.items()
    }
    found = schedules_to_probe(shallow, own, dense_tokens)
    return {label: schedules[::2][:SHALLOW_PROBES] for label, schedules in found.items()}


def graphs_to_probe(transformer: VisionTransformer, runtime: Runtime | None = None) -> float:
    """How many graphs of the whole model take as long to convert as those that the probes of one method need.

    Args:
        transformer: The Vision Transformer.
        runtime: As in `uses_shallow_copy`.
    """
    if uses_shallow_copy(transformer, runtime):
        return SHALLOW_PROBES * (SHALLOW_BLOCKS + 1) / transformer.depth
    return PROBES


def shallow_probes(
    transformer: VisionTransformer,
    example_inputs: Tensor,
    methods: Methods,
    latency: Mapping[str, LatencyModel],
    seconds: float | None,
    limit: TimeLimit,
    verbose: bool,
    tail: bool | None = None,
) -> Probes:
    """What the probes of the whole model would take, from probes of a copy with few blocks.

    The overhead of a reducing block does not depend on how many blocks come before and after it: it is measured in the
    copy and added to the latency that the curve gives for the whole model. The dense model is timed in the same run, so
    that both are of one moment.

    Args:
        transformer: Dense, in a runtime that converts.
        example_inputs: (B, C, H, W) images.
        methods: Label -> the method and the blocks that may reduce.
        latency: Label -> the latency of the tokens alone, of the whole model.
        seconds: Time limit of the run; one round is completed in any case.
        limit: Of planning; its clock is used.
        verbose: Shows a progress bar on a terminal.
        tail: As of `lightning_prune.patch`.

    Raises:
        UnsupportedModelError: If no such copy can be made.
    """
    shallow = shallow_copy(transformer)
    tried = shallow_schedules(shallow, methods, int(next(iter(latency.values())).levels[-1]))
    variants = {
        f"{label} {number}": Variant(methods[label][0], schedule, tail=tail)
        for label, schedules in tried.items()
        for number, schedule in enumerate(schedules)
    }
    stats = _timed(transformer, shallow, example_inputs, variants, seconds, limit, verbose)
    return {
        label: _whole_probes(
            transformer,
            label,
            methods[label],
            latency[label],
            [(schedule, stats[f"{label} {number}"]) for number, schedule in enumerate(schedules)],
            stats["shallow"].ratio,
        )
        for label, schedules in tried.items()
    }


def given_probes(
    profile: LatencyProfile, transformer: VisionTransformer, methods: Methods, latency: Mapping[str, LatencyModel]
) -> Probes:
    """The probes that a profile of another device holds; none of the methods that were not timed there.

    Args:
        profile: The profile.
        transformer: Dense.
        methods: As of `shallow_probes`.
        latency: As of `shallow_probes`.
    """
    found: Probes = {}
    for label, method in methods.items():
        own = [probe for probe in profile.probes if probe.method == str(spec_of(method[0]))]
        timed = [(Schedule(probe.removed), _stats(probe, latency[label].dense_ms)) for probe in own]
        if own and all(len(probe.removed) == transformer.depth for probe in own):
            found[label] = timed
        elif own:
            found[label] = _whole_probes(transformer, label, method, latency[label], timed, own[0].depth_ratio)
    return found


def _stats(probe: OverheadProbe, dense_ms: float) -> LatencyStats:
    ms = dense_ms * probe.depth_ratio
    return LatencyStats(probe.ratio * ms, probe.ratio_spread * ms, probe.ratio, probe.ratio_spread, probe.rounds)


def _whole_probes(
    transformer: VisionTransformer,
    label: str,
    method: tuple[Reduction, Sequence[int]],
    latency: LatencyModel,
    timed: Sequence[tuple[Schedule, LatencyStats]],
    share: float,
) -> list[tuple[Schedule, LatencyStats]]:
    """What probes of the whole model would take, from those of a copy with few blocks.

    Args:
        transformer: The whole transformer.
        label: Of the method.
        method: The method and the blocks that may reduce.
        latency: Of the tokens alone, of the whole model.
        timed: Schedules of the copy, with timings over the dense copy.
        share: Latency of the dense copy over the whole dense model.
    """
    depth = timed[0][0].depth
    overhead = fit_overhead(replace(latency, depth=depth, dense_ms=share * latency.dense_ms), timed)
    aware = replace(latency, overhead=overhead)
    spread = share * max(timing.ratio_spread for _, timing in timed)
    probes = []
    for schedule in schedules_to_probe(transformer, {label: method}, int(latency.levels[-1]))[label]:
        ms = aware.predict(schedule)
        probes.append((schedule, LatencyStats(ms, spread * ms, ms / aware.dense_ms, spread, timed[0][1].rounds)))
    return probes


def _timed(
    transformer: VisionTransformer,
    shallow: VisionTransformer,
    example_inputs: Tensor,
    variants: Mapping[str, Variant],
    seconds: float | None,
    limit: TimeLimit,
    verbose: bool,
) -> dict[str, LatencyStats]:
    """Timings of the variants of the copy over the dense copy, and of that, `"shallow"`, over the dense model."""
    runtime = applied_runtime(transformer)
    assert isinstance(runtime, Runtime)
    switch, runs = VariantSwitch(shallow), {"dense": lambda: transformer.run(example_inputs)}
    current: list[Callable[[], object]] = []

    def prepare(name: str) -> None:
        if name in variants:
            switch.to(variants[name])
        else:
            switch.off()
        current[:] = [runs.get(name, lambda: shallow.run(example_inputs))]

    with (
        runtime.applied(shallow),
        ready_to_run(transformer),
        ready_to_run(shallow),
        progress_bar("Overhead of the methods", seconds, verbose) as on_step,
    ):
        timer = InterleavedTimer[str](
            prepare, lambda: current[0](), between_runs(example_inputs.device), reference="dense", clock=limit.clock,
            references=lambda name: ("shallow",) if name in variants else (),
            settle_seconds=settle_seconds([runtime]),
        )  # fmt: skip
        deadline = float("inf") if seconds is None else limit.clock() + seconds
        names = ["shallow", *variants]
        try:
            timer.measure(names, 1, on_step=on_step)
            # Converting may have taken all the time, and one round says little of an overhead of a few per cent.
            deadline = max(deadline, limit.clock() + _LEAST_SECONDS)
            timer.measure(names, _ROUNDS - 1, deadline, on_step)
        finally:
            switch.off()
    return {name: timer.result(name) for name in names}
