"""Exported files side by side: their accuracy on the same images, and their latency in one interleaved run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from lightning_prune._utils.formatting import milliseconds, percent, points, speedup
from lightning_prune.callbacks.batches import images_from_batch, labels_from_batch
from lightning_prune.comparison.output_capture import capture_outputs
from lightning_prune.comparison.paired_statistics import Difference, paired_difference
from lightning_prune.comparison.variant_runs import flat_metrics
from lightning_prune.exporting import ExportedModel
from lightning_prune.profiling import InterleavedTimer, LatencyStats
from lightning_prune.profiling.interleaved_timer import OWN_THREADS

ROUNDS, SECONDS = 51, 20.0


class RightImages(L.Callback):
    """Records which images a classifier gets right, and the first batch, in a validation or test of one process.

    Attributes:
        right: Whether the class of each image is the right one; None where several processes share the images, or a
            batch holds no labels.
        images: (B, C, H, W), of the first batch.
    """

    def __init__(self) -> None:
        self.right: list[bool] | None = []
        self.images: Tensor | None = None
        self._outputs: list[Any] = []
        self._stop: Callable[[], None] = lambda: None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to record."""
        self._stop()
        self.right, self.images = [] if trainer.world_size == 1 else None, None
        self._stop = capture_outputs(pl_module, self._outputs.append)

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Forgets the outputs of the batch before."""
        self._outputs.clear()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Records a batch."""
        if self.images is None:
            self.images = images_from_batch(batch, None)
        labels = labels_from_batch(batch)
        if labels is None or len(self._outputs) != 1 or self._outputs[0].shape[:1] != labels.shape:
            self.right = None
        if self.right is not None:
            self.right += (self._outputs[0].argmax(dim=1) == labels).tolist()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends recording."""
        self._stop()

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end


class ExportedRow(NamedTuple):
    """What was found of one exported file.

    Attributes:
        model: The file, with its report.
        top1: Share of the images that it gets right; None where accuracy is not measured.
        change: Of that share against the first file; None for the first, and where images cannot be paired.
        timing: Of a batch; its ratio is over the first file.
    """

    model: ExportedModel
    top1: float | None
    change: Difference | None
    timing: LatencyStats


def exported_rows(
    trainer: L.Trainer,
    first: L.LightningModule,
    recorder: RightImages,
    others: Sequence[L.LightningModule],
    run: Callable[[L.LightningModule], Any],
) -> list[ExportedRow]:
    """A row for each file: the first, which was validated already, and the others, which are validated here.

    Args:
        trainer: Has validated the first module, with the recorder among its callbacks.
        first: An `ImageClassifier` of an exported file.
        recorder: As it was after that run.
        others: Likewise, of other files.
        run: Validates a module on the same data.

    Raises:
        ArgumentError: If a file takes images of another size.
    """
    names = {"val/top1", "test/top1"}

    def top1_of(metrics: dict[str, float]) -> float | None:
        return next((value for name, value in metrics.items() if name in names), None)

    found = [(top1_of({k: float(v) for k, v in trainer.callback_metrics.items()}), recorder.right)]
    images = recorder.images
    for module in others:
        metrics = flat_metrics(run(module))
        found.append((top1_of(metrics), recorder.right))
    assert images is not None  # the run of the first module had a batch
    timings = _timed([_model_of(module) for module in (first, *others)], images)
    right = found[0][1]
    return [
        ExportedRow(
            _model_of(module),
            top1,
            paired_difference(right, own) if number and right and own and len(own) == len(right) else None,
            timing,
        )
        for number, (module, (top1, own), timing) in enumerate(zip((first, *others), found, timings, strict=True))
    ]


def exported_table(rows: Sequence[ExportedRow]) -> Table:
    """The files as people read them, a line for each, within 80 columns.

    Args:
        rows: The file that the others are compared with first.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("folder", overflow="fold")
    for heading in ("precision", "top-1", "change", "95% interval", "ms", "p90", "faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        change, timing = row.change, row.timing
        table.add_row(
            str(row.model.report.folder),
            row.model.report.precision,
            percent(row.top1),
            "" if change is None else points(change.change),
            "" if change is None else f"{points(change.low)} {points(change.high)}",
            milliseconds(timing.milliseconds),
            milliseconds(timing.p90_ms),
            speedup(1 / timing.ratio),
        )
    rounds = rows[0].timing.rounds
    table.caption = (
        "change: of top-1 against the first file, in points, by the same images\n"
        f"ms: median latency of a batch, {rounds} interleaved rounds; faster: latency of the first file over this one"
    )
    table.caption_justify = "left"
    return table


def _model_of(module: L.LightningModule) -> ExportedModel:
    model = module.model
    assert isinstance(model, ExportedModel)
    return model


def _timed(models: Sequence[ExportedModel], images: Tensor) -> list[LatencyStats]:
    """Each file on the same batch, in one interleaved run, with the conversion of the images to what it takes."""
    current = [models[0]]

    def prepare(number: int) -> None:
        current[0] = models[number]

    timer = InterleavedTimer[int](
        prepare, lambda: current[0](images), lambda: None, reference=0, settle_seconds=OWN_THREADS
    )
    with torch.inference_mode():
        timer.measure(range(len(models)), 3)
        timer.measure(range(len(models)), ROUNDS - 3, timer.clock() + SECONDS)
    return [timer.result(number) for number in range(len(models))]
