"""The measurements that planning needs, within a time limit: overheads, sensitivities, proxies and timings."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.errors import ArgumentError, DataError, UnsupportedModelError
from lightning_prune.patching import PatchHandle, VisionTransformer, has_exact_tail
from lightning_prune.planning.candidates import MIXED, Candidate, Timings
from lightning_prune.planning.halving import MeasuredMethod, dominated_methods
from lightning_prune.planning.latency_model import LatencyModel, token_levels
from lightning_prune.planning.measurement_tuning import TUNING
from lightning_prune.planning.method_front import Front, MethodFront
from lightning_prune.planning.mixed_front import MixedFront, combinable
from lightning_prune.planning.mixed_latency import MixedLatency, fit_overhead
from lightning_prune.planning.objectives import Objective
from lightning_prune.planning.overhead_probes import (
    Probes,
    given_probes,
    graphs_to_probe,
    shallow_probes,
    uses_shallow_copy,
)
from lightning_prune.planning.probed_schedules import PROBES, Methods, schedules_to_probe
from lightning_prune.planning.sensitivity import Sensitivity, Table
from lightning_prune.planning.sensitivity_run import SensitivityRun, Worse
from lightning_prune.profiling import Estimate, LatencyProfile, LatencyStats, Proxy, Variant, Workload, compare_latency
from lightning_prune.profiling.accuracy_store import AccuracyStore
from lightning_prune.profiling.environment import accuracy_dependencies
from lightning_prune.profiling.interleaved_timer import LEAST_ROUNDS, timed_seconds
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_variants import settle_seconds
from lightning_prune.profiling.output_kinds import OUTPUT_KINDS, choose_proxy
from lightning_prune.profiling.simulated_device import attention_share
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes import applied_runtime
from lightning_prune.schedule import Schedule


@dataclass
class Measurements:
    """Measures what planning needs, of one model on one device.

    Args:
        model: The module that contains the transformer, dense.
        transformer: The Vision Transformer.
        images: (images, C, H, W) calibration images.
        example_inputs: (B, C, H, W) images on the device.
        profile: The latency curve.
        is_foreign: Whether the curve is of another device, so that nothing can be timed here.
        limit: The time limit.
        module_path: Dotted path of the transformer in the model.
        verbose: Shows progress bars on a terminal.
        proxy_name: What is estimated; see `lightning_prune.profiling.output_kinds.choose_proxy`.
        use_cache: Whether to use and to keep estimates of accuracy of other runs.
        cache_dir: Folder of what is kept; see `lightning_prune.profiling.ProfileStore`.
        tail: Whether candidates have the exact tail, as of `lightning_prune.patch`.

    Attributes:
        sensitivity_images: Number of images that the sensitivities were measured on.
        sensitivity_seconds: Time that took.
        dense_ms: Latency of the dense model when it was timed last.
        dense: The statistics of that; None if it was not timed since the profile.
        without_overhead: Labels of methods whose overhead is not known, after `fronts`: the profile does not hold it.
        dominated: Labels of methods that are surely worse than others after some images, and were measured on no more
            of them -> those others, and the number of images.
        not_finite: Names of methods whose outputs are NaN or infinite -> the message of the error, which says for how
            many images. These methods are left out, or their schedule counts as one that keeps nothing.
    """

    model: nn.Module
    transformer: VisionTransformer
    images: Tensor
    example_inputs: Tensor
    profile: LatencyProfile
    is_foreign: bool
    limit: TimeLimit
    module_path: str | None
    verbose: bool
    proxy_name: str = "auto"
    use_cache: bool = False
    cache_dir: str | Path | None = None
    tail: bool | None = None
    sensitivity_images: int = 0
    sensitivity_seconds: float = 0.0
    dense_ms: float = field(init=False)
    dense: LatencyStats | None = field(init=False, default=None)
    without_overhead: list[str] = field(init=False, default_factory=list)
    dominated: dict[str, tuple[tuple[str, ...], int]] = field(init=False, default_factory=dict)
    not_finite: dict[str, str] = field(init=False, default_factory=dict)
    _proxy: Proxy | None = None
    _store: AccuracyStore | None = None
    _seconds_per_image: float = 0.0
    _seconds_per_graph: float | None = None  # in a runtime that converts; None before it is known

    def __post_init__(self) -> None:
        """Takes the dense latency of the curve until it is timed, chooses the proxy and finds what is kept."""
        self.dense_ms = self.profile.dense_ms
        self.proxy_name = choose_proxy(self.model, self.transformer, self.proxy_name)
        if self.use_cache:
            depends = accuracy_dependencies(self.transformer, self.example_inputs, self.images, self.proxy_name)
            if self.tail is not None:
                depends["tail"] = self.tail
            self._store = AccuracyStore(depends, self.cache_dir)

    @property
    def proxy_label(self) -> str:
        """What the proxy is called in tables and reasons."""
        return OUTPUT_KINDS[self.proxy_name].label

    @property
    def proxy(self) -> Proxy:
        """The proxy; the outputs of the dense model are computed at the first use."""
        if self._proxy is None:
            size = max(len(self.example_inputs), TUNING.batch_images)
            device = self.example_inputs.device
            with ready_to_run(self.transformer), progress_bar("Running the dense model", None, self.verbose) as on_step:
                self._proxy = Proxy(self.transformer, self.images, device, size, None, on_step, self.proxy_name)
        return self._proxy

    def accuracy(self, reduction: Reduction | None, schedule: Schedule) -> Estimate:
        """The proxy of a schedule, relative to dense; that of an earlier run if it is kept.

        Args:
            reduction: The method; None if the schedule names one for each block.
            schedule: Tokens that each block removes.
        """
        kept = None if self._store is None else self._store.estimate(reduction, schedule, len(self.images))
        if kept is not None:
            return kept
        proxy = self.proxy
        with (
            ready_to_run(self.transformer),
            progress_bar(f"Accuracy of {MIXED if reduction is None else reduction.name}", None, self.verbose),
            PatchHandle(self.transformer, reduction, schedule, tail=self.tail),
        ):
            try:
                found = proxy.measure()
            except DataError as error:  # of this schedule: the outputs of the dense model were finite
                self.not_finite[MIXED if reduction is None else reduction.name] = str(error)
                return Estimate(0.0, 0.0)
        if self._store is not None:
            self._store.keep_estimate(reduction, schedule, len(self.images), found)
        return found

    def time_candidates(self, candidates: Sequence[Candidate]) -> Timings:
        """Times candidates and the dense model in one interleaved run."""
        variants = {str(number): c.variant._replace(tail=self.tail) for number, c in enumerate(candidates)}
        text = f"Timing {len(candidates)} candidate{'s' if len(candidates) > 1 else ''}"
        timings = self._time(variants, TUNING.timing_share, text)
        return timings["dense"], {c.key: timings[str(number)] for number, c in enumerate(candidates)}

    def fronts(self, methods: Methods, objectives: Sequence[Objective] = ()) -> list[Front]:
        """The front of each method, if time is short of the first ones only; then the one of schedules of several.

        Args:
            methods: Label -> the method and the blocks that may reduce.
            objectives: What the fronts will be searched for; the fewer proxies that takes, the more images they are of.
        """
        passes = TUNING.passes_per_method
        if objectives and all(objective.wants_most_accurate for objective in objectives):
            passes = min(passes, TUNING.passes_per_budget * len(objectives))
        self._limit_images(1 + len(methods) * passes)
        methods = self._affordable(methods)
        prefix, depth = self.transformer.num_prefix_tokens, self.transformer.depth
        try:
            workload = Workload.of(self.transformer.blocks, len(self.example_inputs))
        except ArgumentError:  # such as a quantized block, whose weights cannot be read
            workload = Workload.plain(len(self.example_inputs))
        share = attention_share(workload, self.profile.dense_tokens)
        latency = LatencyModel.from_profile(
            self.profile, share, token_levels(self.profile, self._needed_counts(methods))
        )
        if self.tail is not False and has_exact_tail(self.transformer):
            latency = replace(latency, tail_share=1 - share)
        levels = [int(level) for level in latency.levels]
        # Before block 0, nothing of a block runs on the tokens that are removed.
        own = {
            label: replace(latency, attention_share=0.0) if reduction.site == "input" else latency
            for label, (reduction, _) in methods.items()
        }
        given = given_probes(self.profile, self.transformer, methods, own) if self.is_foreign else None
        probed = self._time_probes(methods, own) if given is None else given
        of_curve = self.profile.method  # whose overhead is part of the curve
        self.without_overhead = [
            label for label in methods if label not in probed and methods[label][0].name != of_curve
        ]

        def costs_of(label: str, sensitivity: Sensitivity, table: Table | None = None) -> Table:
            reduction = methods[label][0]
            return sensitivity.costs(levels, depth, lambda tokens: reduction.max_removed(tokens, prefix), table)

        def worse(tables: Mapping[str, Sensitivity]) -> dict[str, tuple[str, ...]]:
            measured = {}
            for label, table in tables.items():
                model = replace(own[label], overhead=fit_overhead(own[label], probed.get(label, ())))
                weighs = methods[label][0].tracks_sizes and methods[label][0].proportional_attention
                without = [costs_of(label, table, each) for each in table.without_groups()]
                measured[label] = MeasuredMethod(MixedLatency((model,), (weighs,)), costs_of(label, table), without)
            return dominated_methods(measured, levels, objectives)

        run = self._measure_sensitivities(methods, worse)
        fronts: list[MethodFront] = []
        for label, sensitivity in run.tables.items():
            reduction, timed, costs = methods[label][0], probed.get(label, ()), costs_of(label, sensitivity)
            fronts.append(MethodFront(label, reduction, own[label], costs, self.accuracy, timed, self.limit.clock))
        for place, front in enumerate(fronts):
            front.others = fronts[:place]
        several = combinable(fronts, self.transformer.pools_patches)
        if len(several) < 2 or len({block for _, blocks in methods.values() for block in blocks}) < 2:
            return [*fronts]
        return [*fronts, MixedFront(several, self.accuracy, self.limit.clock)]

    def _time(
        self, variants: Mapping[str, Variant], share: float, text: str, min_rounds: int = LEAST_ROUNDS
    ) -> dict[str, LatencyStats]:
        seconds = self.limit.share(share)
        with progress_bar(text, seconds, self.verbose):
            timings = compare_latency(
                self.model,
                self.example_inputs,
                {"dense": None, **variants},
                time_limit=seconds,
                module_path=self.module_path,
                verbose=self.verbose,
                clock=self.limit.clock,
                min_rounds=min_rounds,
            )
        self.dense, self.dense_ms = timings["dense"], timings["dense"].milliseconds
        return timings

    def _limit_images(self, passes: int) -> None:
        """Takes as many calibration images as there is time to measure the proxies on, and finds what is kept of them.

        About as many as an earlier run took are as good, and their proxies need not be measured again.

        Args:
            passes: Passes over the images that are expected.
        """
        if self.limit.seconds is None and self._store is None:
            return
        device, size = self.example_inputs.device, TUNING.first_images
        with ready_to_run(self.transformer):
            for _ in range(2):  # the first pass is slow
                start = self.limit.clock()
                first = Proxy(
                    self.transformer, self.images[:size], device, size, None, proxy="cosine"
                )  # of any outputs
                seconds = (self.limit.clock() - start) / min(size, len(self.images))
        if self._store is not None:
            self._store.check(first.dense)
        if self.limit.seconds is None:
            return
        self._seconds_per_image = seconds
        affordable = int(TUNING.proxy_share * self.limit.left() / (passes * max(seconds, 1e-9)))
        count = min(max(affordable, TUNING.min_images), len(self.images))
        kept = [] if self._store is None else self._store.image_counts()
        near = [other for other in kept if TUNING.kept_ratio <= other / count <= 1 / TUNING.kept_ratio]
        self.images = self.images[: max(near, default=count)]

    def _affordable(self, methods: Methods) -> Methods:
        """The first methods, at least one, for whose least work there is time: each is measured whole or not at all."""
        if self.limit.seconds is None:
            return methods
        left, settling = self.limit.left(), settle_seconds([applied_runtime(self.transformer)])
        kept: dict[str, tuple[Reduction, Sequence[int]]] = {}
        for label, (reduction, blocks) in methods.items():
            probes = 0 if self.is_foreign else PROBES * TUNING.min_runs_per_probe
            images = 1 + self._passes(blocks) + TUNING.min_proxies * min(TUNING.min_images, len(self.images))
            left -= (
                probes * timed_seconds(self.dense_ms / 1e3, settling)
                + images * self._seconds_per_image
                + self._seconds_to_convert()
            )
            if kept and left < 0:
                break
            kept[label] = reduction, blocks
        return kept

    def _needed_counts(self, methods: Methods) -> set[int]:
        """The counts that methods can leave, of those methods that can leave some counts only."""
        n, prefix = self.profile.dense_tokens, self.transformer.num_prefix_tokens
        grid = self.transformer.grid(self.example_inputs)
        return {c for reduction, _ in methods.values() for c in reduction.possible_counts(n, prefix, grid) or ()}

    @property
    def _probes_shallow(self) -> bool:
        return not self.is_foreign and uses_shallow_copy(self.transformer)

    def _seconds_to_convert(self) -> float:
        """Seconds that a runtime takes to convert one schedule of a method to time it, and the probes before."""
        if self._seconds_per_graph is None:
            runtime = applied_runtime(self.transformer)
            self._seconds_per_graph = 0.0
            if not self.is_foreign and runtime is not None and runtime.converts:
                start = self.limit.clock()
                with ready_to_run(self.transformer):
                    self.transformer.run(self.example_inputs)
                self._seconds_per_graph = self.limit.clock() - start
        return (1 + graphs_to_probe(self.transformer)) * self._seconds_per_graph

    def _passes(self, blocks: Sequence[int]) -> float:
        """Forward passes of the whole model that the sensitivity of one image takes, without the dense one."""
        depth = self.transformer.depth
        return len(TUNING.sensitivity_shares) * sum(1 - block / depth for block in blocks)

    def _time_probes(self, methods: Methods, latency: Mapping[str, LatencyModel]) -> Probes:
        """Some schedules of every method, timed in one run, from which the overhead follows."""
        if self._probes_shallow:
            share = self.limit.share(TUNING.overhead_share)
            with suppress(UnsupportedModelError):  # then the whole model is converted for each
                return shallow_probes(
                    self.transformer, self.example_inputs, methods, latency, share, self.limit, self.verbose, self.tail
                )
        tried = schedules_to_probe(self.transformer, methods, self.profile.dense_tokens)
        variants = {
            f"{label} {number}": Variant(methods[label][0], schedule, tail=self.tail)
            for label, schedules in tried.items()
            for number, schedule in enumerate(schedules)
        }
        # All of a method together say what its overhead is: they need no intervals of their own.
        rounds = TUNING.min_runs_per_probe - 1
        timings = self._time(variants, TUNING.overhead_share, "Overhead of the methods", rounds)
        return {
            label: [(schedule, timings[f"{label} {number}"]) for number, schedule in enumerate(schedules)]
            for label, schedules in tried.items()
        }

    def _measure_sensitivities(self, methods: Methods, worse: Worse) -> SensitivityRun:
        """The sensitivities to the methods, on the same images: as many as the time allows."""
        run = SensitivityRun(
            self.transformer,
            {
                label: (reduction, self._sensitivity(reduction, blocks))
                for label, (reduction, blocks) in methods.items()
            },
            self.images,
            self.example_inputs.device,
            self.limit,
            self._store,
            self._seconds_per_image,
        )
        if run.missing:
            run.measure(worse, *self._unsure_first(), self.verbose)
        self.dominated |= run.dominated
        self.not_finite |= run.not_finite
        self.sensitivity_images, self.sensitivity_seconds = run.num_images, run.seconds
        return run

    def _unsure_first(self) -> tuple[Tensor, Tensor | None]:
        """The order in which images are taken, and what each counts for; None where all are alike.

        Pruning changes little where the dense model is sure: the images where it is least sure come first. Of a
        ViT with 12 blocks, their divergences ranked blocks, counts and methods as well as those of four times as many
        random images.
        """
        uncertainty = OUTPUT_KINDS[self.proxy_name].uncertainty
        if uncertainty is not None:
            sizes = uncertainty(self.proxy.dense)
            if len(sizes) > 1 and float(sizes.mean()) > TUNING.min_uncertainty:
                return sizes.argsort(descending=True, stable=True), sizes / sizes.mean()
        return torch.arange(len(self.images)), None

    def _sensitivity(self, reduction: Reduction, blocks: Sequence[int]) -> Sensitivity:
        n = self.profile.dense_tokens
        fewest = max(n - reduction.max_removed(n, self.transformer.num_prefix_tokens), n // 10)
        counts = [round(n - share * (n - fewest)) for share in TUNING.sensitivity_shares]
        grid = self.transformer.grid(self.example_inputs) if reduction.scales_images else None
        return Sensitivity(self.transformer, reduction, blocks, counts, n, self.proxy_name, grid, self.tail)
