"""The command `export`: writes the pruned model of a configuration for a runtime, checked on the validation images."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import lightning as L
from rich.console import Console
from torch import Tensor, nn

from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.validation import check, check_choice, check_int, check_path
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.first_batch import FirstBatch, on_first_batch
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.errors import ArgumentError
from lightning_prune.exporting import ExportReport, export
from lightning_prune.exporting.export_report import GraphForm
from lightning_prune.exporting.exported_graph import BatchSize
from lightning_prune.exporting.folder import PREPROCESSING, check_new
from lightning_prune.exporting.image_input import InputForm
from lightning_prune.exporting.instructions import figures
from lightning_prune.exporting.precision import PRECISIONS, Precision
from lightning_prune.exporting.registry import parse_format
from lightning_prune.patching import PatchHandle, find_vision_transformer, patch
from lightning_prune.schedule import KeepRates, Schedule

_OPERATORS = 8  # that are printed


def run_export(
    trainer: L.Trainer,
    model: L.LightningModule,
    config: PruningConfig,
    output: str,
    schedule: str | None,
    format: str,
    batch: BatchSize,
    batch_size: int | None,
    inputs: InputForm,
    precision: Precision,
    reduce_range: bool | None,
    min_agreement: float | None,
    graph: GraphForm | Literal["auto"],
    opset: int | None,
    overwrite: bool,
    **data: Any,
) -> ExportReport:
    """Exports the model with a schedule; prints what was written, how far it agrees, and how fast it is.

    Args:
        trainer: Runs one validation batch, so that images are those that the transformer receives.
        model: Contains the Vision Transformer.
        config: Gives the schedule and its method if `schedule` is None, and the number of calibration images.
        output: See `lightning_prune.export`.
        schedule: File of a schedule that names its method.
        format: See `lightning_prune.export`.
        batch: See `lightning_prune.export`.
        batch_size: Number of images in a batch; that of the validation loader if None.
        inputs: See `lightning_prune.export`.
        precision: See `lightning_prune.export`.
        reduce_range: See `lightning_prune.export`.
        min_agreement: See `lightning_prune.export`.
        graph: See `lightning_prune.export`.
        opset: See `lightning_prune.export`.
        overwrite: See `lightning_prune.export`.
        data: `datamodule` or `dataloaders`.

    Raises:
        ArgumentError: As `lightning_prune.export`, or if there is no schedule.
        DataError: If there is no batch.
        ExportError: As `lightning_prune.export`.
        FileFormatError: If the schedule cannot be read.
        RuntimeUnavailableError: As `lightning_prune.export`.
    """
    plan = _plan(config, schedule)
    check_choice("precision", precision, PRECISIONS)
    parse_format(format, precision=precision, reduce_range=reduce_range)
    check_new(output, overwrite)
    if batch_size is not None:
        check_int("batch_size", batch_size, 1, "a number of images")

    def take(first: FirstBatch) -> tuple[Tensor, Tensor]:
        return first.images.detach().cpu(), first.calibration().images

    # The loop has ended when the model is exported: its precision and what it compiled would be a part of the graph.
    images, calibration = on_first_batch(trainer, model, config, take, **data)
    count = len(images) if batch_size is None else batch_size
    example = images[:count] if count <= len(images) else images[:1].expand(count, -1, -1, -1).contiguous()
    exported, path = _exported(model, config)
    is_planned = plan is not None
    with (
        progress_bar("Exporting", None, config.verbose),
        _without_trainer(model),
        nullcontext() if is_planned else _patched(exported, path, config),
    ):
        report = export(
            exported,
            output,
            example,
            plan=plan,
            format=format,
            calibration=calibration,
            opset=opset,
            batch=batch,
            inputs=inputs,
            precision=precision,
            reduce_range=reduce_range,
            min_agreement=min_agreement,
            graph=graph,
            preprocessing=_preprocessing(model),
            module_path=path,
            restore=config.restore if is_planned else None,
            overwrite=overwrite,
        )
    if trainer.is_global_zero:
        _print(report)
    return report


def _exported(model: nn.Module, config: PruningConfig) -> tuple[nn.Module, str | None]:
    """What is exported, and the path of the transformer in it: with `restore` the module that reads all its tokens."""
    transformer = find_vision_transformer(model, config.module_path, config.restore)
    whole = model.model if isinstance(model, ImageClassifier) else transformer.outer
    if config.module_path is None:
        return whole, None
    return whole, next(path for path, each in whole.named_modules() if each is transformer.root) or None


@contextmanager
def _without_trainer(model: L.LightningModule) -> Iterator[None]:
    """Takes its Trainer from a module, which is copied for the export; its data would be copied, too."""
    trainer, model.trainer = model.trainer, None
    try:
        yield
    finally:
        model.trainer = trainer


def _plan(config: PruningConfig, schedule: str | None) -> Schedule | KeepRates | None:
    """The schedule that names its method; None where the method and the schedule of the config are to be applied."""
    if schedule is not None:
        check_path("schedule", schedule)
        check("prune.schedule", config.schedule, "left out with `schedule`", config.schedule == "auto")
        return Schedule.load(schedule)
    if config.is_planned and config.objective is not None:
        raise ArgumentError(
            f"`prune.objective` must be left out, as `export` does not plan, got {config.objective}: `plan` and "
            "`compare` write schedules, and `--schedule` takes their file."
        )
    if config.is_planned:
        raise ArgumentError(
            "`schedule` must be the file of a schedule, which `plan` writes, got None. `--prune.schedule` takes a "
            "number or a list, too; 0 exports the dense model."
        )
    return config.schedule if config.is_mixed and isinstance(config.schedule, Schedule | KeepRates) else None


def _patched(model: nn.Module, path: str | None, config: PruningConfig) -> PatchHandle:
    """Patches a model by the method and the schedule of the config."""
    schedule = None if config.is_adaptive or config.schedule == "auto" else config.schedule
    return patch(
        model,
        config.reduction,
        schedule,
        block=config.reducing_block,
        tail=config.deployed_tail,
        module_path=path,
        restore=config.restore,
    )


def _preprocessing(model: nn.Module) -> dict[str, Any] | None:
    """How the images of a module are prepared, if it says so."""
    found = getattr(model, "data_config", None) or {}
    return {key: value for key, value in found.items() if key in PREPROCESSING} or None


def _print(report: ExportReport) -> None:
    console = Console(markup=False)
    removed = "no tokens removed" if report.method is None else f"tokens removed by {report.method}"
    tokens = "" if report.tokens is None else f", {report.tokens[-1]} left"
    inputs = ", uint8 images" if report.inputs.form == "uint8" else ""
    tail = ", exact tail" if report.tail else ""
    lines = [f"{report.model}: {removed}{tokens}{tail}, {report.precision}{inputs}, {report.batch} batch."]
    lines += figures(report)
    operators = [f"{name} {count}" for name, count in report.operators.items()]
    more = f" and {len(operators) - _OPERATORS} more" if len(operators) > _OPERATORS else ""
    lines.append(f"Operators: {', '.join(operators[:_OPERATORS])}{more}.")
    lines.append(f"Written: {', '.join(str(path) for path in sorted(report.folder.iterdir()))}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
