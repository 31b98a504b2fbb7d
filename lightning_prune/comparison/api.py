"""Dense against methods at target speed-ups: all variants on the same data, device and clock."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor

from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.decision import profiled
from lightning_prune.callbacks.first_batch import FirstBatch, first_batch
from lightning_prune.callbacks.hooks import command_run
from lightning_prune.comparison.method_search import check_speedups, search_methods
from lightning_prune.comparison.paired_statistics import compared, environment_columns, flat, logged, timed
from lightning_prune.comparison.predictions import OutcomeRecorder
from lightning_prune.comparison.resume import State, VariantResult, ask, data_identity, digest, weights_digest
from lightning_prune.comparison.variants import (
    ComparisonPlan,
    Deployment,
    PlannedVariant,
    VariantRequest,
    read_methods,
    reduction_of,
    variant_of,
)
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.patching import TokenTrace, find_vision_transformer, trace_tokens
from lightning_prune.planning.measurements import Measurements, TimeLimit
from lightning_prune.profiling import measurement_context
from lightning_prune.reduction import POMT, Reduction
from lightning_prune.report.rows import Row

_PICTURES = 4  # images whose tokens are traced


class Opening(L.Callback):
    """Asks on the first batch of a validation run of one batch what is known of the question, and decides the rest."""

    def __init__(
        self,
        config: PruningConfig,
        entries: Sequence[VariantRequest],
        speedups: Sequence[float],
        output: Path,
        fresh: bool,
        tell: Callable[[str], None],
        limit: int | float | None,
    ) -> None:
        self.limit = limit  # of the runs to come: this one has one batch
        self.config, self.entries, self.speedups = config, entries, speedups
        self.output, self.fresh, self.tell = output, fresh, tell
        self.state: State | None = None  # on rank 0
        self.decided: ComparisonPlan | None = None
        self.finished: dict[str, VariantResult] = {}
        self.pictures: Tensor | None = None
        self.traces: dict[str, TokenTrace] = {}

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Decides, once."""
        if self.decided is None and not dataloader_idx:
            with first_batch(trainer, pl_module, batch, self.config) as first:
                self.decided, self.finished = first.on_rank_zero(lambda: self._decide(first))

    def _decide(self, first: FirstBatch) -> tuple[ComparisonPlan, dict[str, VariantResult]]:
        config, images, pl_module = self.config, first.images, first.module
        calibration = None
        settings: dict[str, Any] = {
            "block": config.place,
            "time_limit": config.time_limit,
            "target": config.module_path,
        }
        if any(entry.searches for entry in self.entries):
            calibration = first.calibration().images
            settings["calibration"] = digest(calibration)
        question = ask(
            weights=weights_digest(pl_module),
            data=data_identity(first.trainer.val_dataloaders, first.batch, self.limit),
            context=measurement_context(first.transformer.compiled_root, images),
            entries=self.entries,
            speedups=self.speedups,
            settings=settings,
        )
        self.state = State(self.output, question, self.fresh)
        decided = self.state.decided()
        if decided is None:
            self._tell_news(self.state)
            decided = search_methods(
                first.transformer,
                images,
                self.entries,
                self.speedups,
                block=config.place,
                time_limit=config.time_limit,
                verbose=config.verbose,
                planner=None if calibration is None else partial(self._search, pl_module, images, calibration),
            )
            self.state.keep_decided(decided)
        finished = self._known(self.state, decided)
        pictures = self._pictures(first)
        self.pictures = pictures.detach().cpu()
        self.traces = self._traced(pl_module, pictures, decided)
        return decided, finished

    def _search(self, pl_module: L.LightningModule, images: Tensor, calibration: Tensor) -> Measurements:
        """What `auto` searches with; its latency curve may be one that is kept."""
        config = self.config
        found = profiled(replace(config, method="auto"), pl_module, images)
        if found.reused:
            when = found.profile.context.get("measured", "before")
            self.tell(f"The latency curve that `auto` plans on was measured {when}, and kept.")
        return Measurements(
            model=pl_module,
            transformer=find_vision_transformer(pl_module, config.module_path),
            images=calibration,
            example_inputs=images,
            profile=found.profile,
            is_foreign=False,
            limit=TimeLimit(config.time_limit),
            module_path=config.module_path,
            verbose=config.verbose,
        )

    def _known(self, state: State, decided: ComparisonPlan) -> dict[str, VariantResult]:
        variants = [planned.variant for planned in decided.planned if planned.timing is not None]
        found = {variant: state.finished(variant) for variant in variants}
        known = {variant: finished for variant, finished in found.items() if finished is not None}
        if known:
            self.tell(f"Going on from {state.folder}: {len(known)} of {len(variants)} variants were finished before.")
        return known

    def _tell_news(self, state: State) -> None:
        news = state.news()
        if news:
            self.tell(f"Starting anew beside what {state.folder.parent} holds: {', '.join(news)} differ.")

    def _pictures(self, first: FirstBatch) -> Tensor:
        """A few images from all over the dataset; the first of the batch where they cannot be had, or are of two sizes.

        Folders are read class by class, so that the first batch shows one class, and at batch size 1 one image.
        """
        images = first.images
        try:
            found = first.sample(_PICTURES).images
        except DataError:
            found = images
        same = found.shape[1:] == images.shape[1:]
        return (found if same else images)[:_PICTURES].to(images.device, images.dtype)

    def _traced(self, pl_module: L.LightningModule, images: Tensor, decided: ComparisonPlan) -> dict[str, TokenTrace]:
        """One variant of each method in float: all at the largest target that they all reach, where there is one."""
        rows: dict[str, list[PlannedVariant]] = {}
        entries = {entry.name: entry for entry in self.entries if not entry.int8 and entry.method}
        for planned in decided.planned:
            if planned.timing is not None and planned.request in entries:
                rows.setdefault(planned.request, []).append(planned)
        shared = [
            s for s in self.speedups if all(s in {p.target_speedup for p in r} for r in rows.values() if r[0].schedule)
        ]
        traces = {}
        for name, candidates in rows.items():
            chosen = next(
                (p for p in candidates if shared and p.target_speedup == shared[-1]), candidates[len(candidates) // 2]
            )
            reduction = reduction_of(chosen, entries[name])
            assert reduction is not None  # as every entry with a method and a timing has one
            trace = trace_tokens(pl_module, images, reduction, chosen.schedule, target=self.config.module_path)
            traces[chosen.variant] = TokenTrace(trace.groups.cpu(), trace.held.cpu(), trace.tokens.cpu(), trace.grid)
        return traces


SPEEDUPS = (1.1, 1.25, 1.5, 2.0)
_UNUSED_PICTURES = 4  # images whose tokens are traced


class MethodComparison(NamedTuple):
    """A table of methods with what is behind it.

    Attributes:
        rows: The variants, dense first.
        decided: Their schedules and timings, and what cannot be reached.
        pictures: A few images of the dataset, on the CPU; empty on other ranks than 0.
        traces: Variant -> what became of their patches; one variant a method.
    """

    rows: list[Row]
    decided: ComparisonPlan
    pictures: Tensor | None
    traces: dict[str, TokenTrace]


def compare_methods(
    trainer: L.Trainer,
    model: L.LightningModule,
    config: PruningConfig,
    methods: Sequence[str],
    speedups: Sequence[float] | None,
    output: Path,
    fresh: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    **data: Any,
) -> MethodComparison:
    """Validates every method at every target speed-up that it can reach, everything else alike.

    What is decided and each variant that is validated are kept under `output/state` at once: the same question asked
    again goes on from there.

    Args:
        trainer: Runs all validations; a `TokenPruning` among its callbacks is idle meanwhile.
        model: The module; dense again afterwards.
        config: Gives block, time limit, target and `images_from_batch`; and its own reduction where it is named.
        methods: Names of reductions, `auto`, `dense`, `int8`, and names of reductions with `+int8`.
        speedups: The targets; `SPEEDUPS` if None.
        output: Folder, writable.
        fresh: Forgets what is known of this question.
        tell: Says what goes on.
        **data: `dataloaders` or `datamodule`, for `trainer.validate`.

    Raises:
        ArgumentError: If a name or target is wrong, or the config has a schedule, an objective or a method of
            its own, which would play no part.
        UnsupportedModelError: If no method can be used with this model.
        DataError: If there is nothing to validate on.
    """
    entries = read_methods(methods, config.method if isinstance(config.method, Reduction) else POMT())
    targets = check_speedups(list(SPEEDUPS if speedups is None else speedups))
    _refuse_idle_settings(config, entries)
    opening = Opening(config, entries, targets, output, fresh, tell, trainer.limit_val_batches)
    with command_run(trainer, config, opening, one_batch=True):
        trainer.validate(model, verbose=False, **data)
    if opening.decided is None:
        raise DataError("The validation loader yielded no batch to compare on.")
    decided, finished = opening.decided, dict(opening.finished)
    runs = {planned.variant: planned for planned in decided.planned if planned.timing is not None}
    by_name = {entry.name: entry for entry in entries}
    for number, (variant, planned) in enumerate(runs.items(), 1):
        if variant in finished:
            continue
        twin = next((done for done in finished if runs[done].runs == planned.runs), None)
        if twin is not None:  # two targets that the same schedule reaches
            finished[variant] = finished[twin]
        else:
            tell(f"Validating {variant} ({number} of {len(runs)})")
            deployment = Deployment(
                variant_of(planned, by_name[planned.request]), decided.dense_tokens, config.module_path
            )
            recorder = OutcomeRecorder(config.module_path, config.images_from_batch)
            with command_run(trainer, config, deployment, recorder):
                metrics = trainer.validate(model, verbose=False, **data)
            finished[variant] = VariantResult(flat(metrics), recorder.images, recorder.outcomes)
        if opening.state is not None:  # on rank 0
            opening.state.keep_finished(variant, finished[variant])
    rows = [_row(planned, decided, finished) for planned in decided.planned]
    return MethodComparison(rows, decided, opening.pictures, opening.traces)


def _refuse_idle_settings(config: PruningConfig, entries: Sequence[VariantRequest]) -> None:
    own = config.method
    if isinstance(own, Reduction) and own != POMT() and all(entry.reduction is not own for entry in entries):
        raise ArgumentError(f"`method` plays no part unless `methods` name it; got {own!r}, which they do not.")
    idle = {
        "schedule": config.schedule != "auto",
        "objective": config.objective is not None,
        "protocol": config.protocol != "deployed",
    }
    for name, given in idle.items():
        if given:
            raise ArgumentError(
                f"`{name}` plays no part where `methods` are compared at `speedups`; got {getattr(config, name)!r}."
            )


def _row(planned: PlannedVariant, decided: ComparisonPlan, finished: dict[str, VariantResult]) -> Row:
    done, dense = finished.get(planned.variant), finished["dense"]
    schedule, n = planned.schedule, decided.dense_tokens
    cut: dict[str, Any] = {}
    if schedule is not None:
        block = " ".join(map(str, schedule.reducing))
        cut = {"block": block, "removed": schedule.total_removed, "tokens": schedule.tokens(n)[-1]}
    elif planned.method in ("", "int8") and planned.timing is not None:
        cut = {"removed": 0, "tokens": n}
    figures: dict[str, Any] = timed(planned.timing)
    if done is not None:
        figures |= logged(done.metrics)
        if planned.variant != "dense":
            figures |= compared(dense.outcomes, done.outcomes)
    return Row(
        variant=planned.variant,
        method=planned.method,
        int8=planned.int8,
        target_speedup=planned.target_speedup,
        **cut,
        **figures,
        joules_per_image=planned.joules_per_image,
        watts=planned.watts,
        note=planned.note,
        **environment_columns(decided.context, done.images if done is not None else 0),
    )
