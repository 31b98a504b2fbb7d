"""Comparing dense with pruned: methods, objectives, target speed-ups and given schedules on the same images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from torch import nn

from lightning_prune._utils.files import other_kinds, output_folder
from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.trees import tree_leaves
from lightning_prune._utils.validation import check, check_bool, check_speedups
from lightning_prune.callbacks import config_of
from lightning_prune.callbacks.hooks import command_run, without_bars
from lightning_prune.callbacks.rank_agreement import refuse_spawned
from lightning_prune.comparison.best_variant import choose_best
from lightning_prune.comparison.class_changes import ClassChange, names_of_classes
from lightning_prune.comparison.comparison_results import Comparison, check_output_paths, normalisation_of
from lightning_prune.comparison.first_loader import FirstLoader
from lightning_prune.comparison.loggers import log_rows, muted_loggers
from lightning_prune.comparison.lost_processes import watching_processes
from lightning_prune.comparison.planned_variants import ComparisonPlan, plain_value
from lightning_prune.comparison.request_reading import in_runtimes, read_requests, read_runtimes
from lightning_prune.comparison.requests import ComparisonSettings
from lightning_prune.comparison.resume import VariantResult
from lightning_prune.comparison.setup import ComparisonSetup
from lightning_prune.comparison.variant_rows import paired_classes, row_of
from lightning_prune.comparison.variant_runs import exit_if_terminated, validate_variants
from lightning_prune.errors import DataError, FileWriteError
from lightning_prune.patching.models import restoring
from lightning_prune.planning import Objective
from lightning_prune.profiling.clocks import read_clock
from lightning_prune.reduction import Reduction
from lightning_prune.report.tables import comparison_table
from lightning_prune.runtimes.calibration import calibrating_with
from lightning_prune.runtimes.graph_store import keeping_graphs

_KEPT_OF_SEARCHES = (
    "Of searches for target speed-ups the latency profile and the estimates of accuracy are kept; timings are repeated."
)


def compare(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: Any,
    methods: Sequence[str | Reduction] | None = None,
    speedups: Sequence[float] | None = None,
    objective: Objective | None = None,
    runtimes: Sequence[str] | None = None,
    output: str | Path | None = None,
    *,
    resume: bool = True,
    per_class: bool = False,
    command: str = "",
    settings: Mapping[str, Any] | None = None,
    on_message: Callable[[str], None] | None = None,
    on_results: Callable[[Comparison], None] | None = None,
    clock: str | Callable[[], float] | None = None,
    controls: bool = True,
    metric_from_step: str | None = None,
) -> Comparison:
    """Validates the module dense and pruned, with everything else alike.

    All variants are timed in one interleaved run and validated one after another. Each method is planned for every
    target speed-up or, without `speedups`, by the objective. Without `methods` the method of the trainer's
    `TokenPruning` is compared with the POMT paper's own choice; if that callback has a schedule, it is a variant, too.

    Where schedules are planned, `random` and `resize` are planned likewise, after the methods, which have to beat them.
    One that the model does not support is left out, and a message says so. As the best variant one is chosen only if it
    is named among `methods`.

    The `time_limit` of the settings is that of planning and timing all variants together; validation, windows in which
    energy is measured and the paper's protocol are not part of it. What is left is divided among what is still to do. A
    method that there is no time for is not planned, and its row says so. The least work is done whatever time it takes:
    the first method is planned, and each variant timed in three rounds.

    Loggers of the trainer get the figures of each row as `compare/<variant>/<column>`, and nothing of the validations.

    With several processes (`strategy="ddp"`) rank 0 plans and times, the others wait, and all validate each variant on
    their shares of the images. Rank 0 alone writes and prints. All ranks return the rows; files, pictures and traces
    are known on rank 0.

    With `output`, the plan and each finished variant are kept under `output/state`: the same comparison, started again,
    goes on from there. An error or an interruption says in a note what is kept. Of unfinished searches for target
    speed-ups timings are repeated; their estimates of accuracy are kept as those of `lightning_prune.plan` are.

    Args:
        trainer: Runs all validations. Settings come from its `TokenPruning`, which is idle meanwhile, or are the
            defaults of `PruningConfig`.
        module: Contains one Vision Transformer; dense again afterwards.
        data: A LightningDataModule, or the validation loaders; of several loaders the first is compared, and a warning
            says so.
        methods: Reductions and names: of reductions, `"auto"`, `"int8"`, `"exact"` (dense with the exact tail, see
            `lightning_prune.patch`), and `+int8` after one of these; dense is always there. None for the method of the
            callback.
        speedups: Dense latency over that of each method, each > 1; None to plan by the objective.
        objective: Plans the schedules if there are no `speedups`, and chooses the best variant, `schedule.yaml`; that
            of the callback if None.
        runtimes: What executes the model: `"torch"`, `"torch.compile:mode=blocks"`, ...; that of the callback if None.
            With several, each variant is planned, timed and validated in each, and compared with dense there. Compiling
            takes seconds for each variant: give time.
        output: Folder for the files; None writes none.
        resume: Whether to go on from what is kept in `output`.
        per_class: Whether to say the change of each class, too, and the worst of each variant.
        metric_from_step: The key of a metric of each image, a tensor (B,), in the mapping that `validation_step`
            returns, such as the IoU of each image. Its mean is the metric of the rows, and its change has an interval,
            paired by image. By default the metric is what the module logs, without an interval.
        command: What was typed, for the report.
        settings: More settings for `results.json`, as plain values.
        on_message: Called with lines about the progress, on rank 0; they are printed if None and the settings are
            verbose.
        on_results: Called with the results on rank 0, before they are written to `output`. If None, a table is printed
            where they cannot be written.
        clock: What latencies are timed by: `"wall"`, `"cpu"` (CPU time of this process, at one thread), or a function;
            that of the trainer's `TokenPruning` if None. The time limit is wall time.
        controls: Whether `random` and `resize` are added.

    Returns:
        The rows, and what they were made from.

    Raises:
        ArgumentError: If `output` cannot be written to, a method is not known, or an argument is unusable.
        DataError: If there is nothing to validate on.
        FileWriteError: If a file cannot be written to `output` at the end.
        UnsupportedModelError: If none of the methods can be used with the model, or the strategy shards the model or
            runs in processes of its own.

    Example:
        >>> import lightning as L
        >>> import lightning_prune as lp
        >>> trainer = L.Trainer(callbacks=[lp.TokenPruning()], logger=False)
        >>> # results = lp.compare(trainer, module, data, methods=["tome", "auto"], speedups=[1.25, 1.5], output="out")
    """
    is_trainer = any(kind.__name__ == "Trainer" for kind in type(trainer).__mro__)  # also of pytorch_lightning
    check("trainer", trainer, "a lightning.Trainer", is_trainer)
    check("module", module, "a LightningModule", isinstance(module, nn.Module) and hasattr(module, "validation_step"))
    _check_data(data, module)
    for name, function in (("on_message", on_message), ("on_results", on_results)):
        check(name, function, "a function or None", function is None or callable(function))
    check_bool("resume", resume)
    check_bool("per_class", per_class)
    check_bool("controls", controls)
    is_key = metric_from_step is None or (isinstance(metric_from_step, str) and bool(metric_from_step))
    check("metric_from_step", metric_from_step, "the name of a metric or None", is_key)
    if clock is not None:
        read_clock(clock)
    check("settings", settings, "a mapping or None", settings is None or isinstance(settings, Mapping))
    check("command", command, "a text", isinstance(command, str))
    refuse_spawned(trainer)
    config = config_of(trainer)
    if isinstance(clock, str):
        config = replace(config, clock=clock)
    used = read_runtimes(runtimes, config.runtime)
    valid = objective is None or isinstance(objective, Objective)
    check("objective", objective, "an Objective such as AccuracyBudget(0.005), or None", valid)
    goal = config.effective_objective if objective is None else objective
    requests = in_runtimes(read_requests(config, methods, speedups, goal, controls), used)
    targets = [] if speedups is None else check_speedups(speedups)
    with nullcontext() if output is None else output_folder(output, other_kinds("results.json")) as folder:
        if folder is not None:
            check_output_paths(folder)
        limit = trainer.limit_val_batches
        asked = ComparisonSettings(config, requests, used, targets, folder, resume, limit, metric_from_step)
        report = rank_zero_only(on_message or (_print_line if config.verbose else _ignore))
        loader = FirstLoader(module, data)
        setup = ComparisonSetup(asked, report, read_clock(config.clock if clock is None else clock))
        try:
            plain = replace(config, runtime="torch")  # the setup applies the runtimes
            with (
                restoring(config.restore),
                progress_bar("Comparing", None, config.verbose and trainer.is_global_zero),
                without_bars(trainer),
                muted_loggers(trainer),
                keeping_graphs(),
                watching_processes(trainer, lambda: "" if setup.state is None else setup.state.summary()),
            ):
                with command_run(trainer, plain, setup, one_batch=True), loader.arguments() as arguments:
                    trainer.validate(module, verbose=False, **arguments)
                exit_if_terminated(trainer)
                if setup.plan is None:
                    raise DataError("The validation loader yielded no batch to compare on.")
                plan = setup.plan
                with calibrating_with(setup.calibration):
                    results = validate_variants(
                        trainer, module, loader, asked, plan, setup.results, setup.state, report
                    )
        except BaseException as error:
            kept = "" if setup.state is None else setup.state.summary()
            if (
                targets
                and setup.plan is None
                and config.use_cache
                and isinstance(error, KeyboardInterrupt | SystemExit)
            ):
                kept = f"{kept} {_KEPT_OF_SEARCHES}".strip()
            if kept:
                error.add_note(kept)
            elif setup.state is not None:
                setup.state.forget_if_nothing_is_kept()
            if isinstance(error, SIGTERMException):
                error.code = 143  # Lightning's is 0
            raise
        classes = _changes_of_classes(plan, results, names_of_classes(trainer, data)) if per_class else None
        rows = tuple(row_of(planned, plan, results, loader.note, classes, metric_from_step) for planned in plan.planned)
        is_stated = objective is not None or config.objective is not None
        is_by_objective = is_stated or any(request.objective is not None for request in requests)
        added = {request.name for request in requests if request.is_control}
        named = [planned for planned in plan.planned if planned.request not in added]
        found = Comparison(
            rows=rows,
            plan=plan,
            best=choose_best(rows, named, goal) if is_by_objective else None,
            config={**_plain_config(asked, goal, trainer), "per_class": per_class, **(settings or {})},
            command=command,
            pictures=setup.pictures,
            traces=setup.traces,
            normalisation=normalisation_of(module),
            classes=classes,
        )
        if not trainer.is_global_zero:
            return found
        if on_results is not None:
            on_results(found)
        if folder is not None:
            found = _written(found, folder, is_shown=on_results is not None)
        log_rows(trainer, found.rows)
        return found


def _check_data(data: Any, module: nn.Module) -> None:
    """Raises unless there is something to validate on: Lightning would say so in its own words, or much later."""
    if isinstance(data, L.LightningDataModule):
        return
    if data is None:
        valid = is_overridden("val_dataloader", module)
        check("data", data, "given for a module without `val_dataloader`", valid)
        return
    loaders = tree_leaves(getattr(data, "iterables", data))
    valid = bool(loaders) and all(isinstance(each, Iterable) and not isinstance(each, str) for each in loaders)
    check("data", data, "a LightningDataModule, or validation loaders", valid)


def _changes_of_classes(
    plan: ComparisonPlan, results: Mapping[str, VariantResult], names: Mapping[int, str]
) -> dict[str, tuple[ClassChange, ...]]:
    """Variant -> the changes of its classes, of those that were validated; dense has none."""
    return {
        planned.variant: paired_classes(results[plan.dense_of(planned).variant], results[planned.variant], names)
        for planned in plan.planned
        if not planned.is_dense and planned.variant in results
    }


def _written(found: Comparison, folder: Path, is_shown: bool) -> Comparison:
    """Writes the files; prints the table where that fails and the results were not shown."""
    try:
        return replace(found, files=tuple(found.save(folder)))
    except FileWriteError:
        if not is_shown:
            Console(markup=False).print(comparison_table(found.rows))
        raise


def _plain_config(settings: ComparisonSettings, goal: Objective, trainer: L.Trainer) -> dict[str, Any]:
    """Everything that was asked for, as plain values."""
    config = settings.config
    return {
        "methods": [request.name for request in settings.requests],
        "speedups": list(settings.speedups),
        "runtimes": [runtime.name for runtime in settings.runtimes],
        "objective": str(goal),
        "pruning": {each.name: plain_value(getattr(config, each.name)) for each in fields(config)},
        "trainer": {
            "accelerator": type(trainer.accelerator).__name__,
            "strategy": type(trainer.strategy).__name__,
            "processes": trainer.world_size,
            "precision": trainer.precision,
            "limit_val_batches": trainer.limit_val_batches,
        },
    }


def _print_line(text: str) -> None:
    Console(markup=False).print(text, soft_wrap=True, highlight=False)


def _ignore(_: str) -> None:
    pass
