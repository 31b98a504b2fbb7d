"""Dense against pruned on the same data, device and clock: the rows of one honest table."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.attached import attached_callbacks
from lightning_prune.callbacks.decision import Decision
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.planning import AccuracyBudget, Objective
from lightning_prune.survey import Survey


@dataclass(frozen=True)
class Row:
    """One variant of the table.

    Attributes:
        variant: Its name; `dense` is the unpruned model.
        method: The reduction; empty for dense.
        block: The reducing blocks; empty for dense.
        removed: R, tokens removed in all.
        tokens: Tokens that leave the last reducing block.
        top1: Share of images whose best class is right; None where the module does not log it.
        top5: Share of images with the right class among the best five.
        latency_ms: Median time of the transformer on one batch, from one interleaved run of all variants.
        latency_spread: Half the distance between the quartiles of those times.
        throughput: Images a second in forward during validation.
        throughput_end_to_end: Images a second of the whole loop, loading included; dense, which comes first, pays for
            cold file caches.
        speedup: Dense latency over this one, the median over rounds in which both ran.
        images: Images validated.
        device: What it ran on.
        batch_size: Images in a batch.
        precision: Of the computation.
    """

    variant: str
    method: str
    block: str
    removed: int
    tokens: int
    top1: float | None
    top5: float | None
    latency_ms: float
    latency_spread: float
    throughput: float | None
    throughput_end_to_end: float | None
    speedup: float
    images: int
    device: str
    batch_size: int
    precision: str

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, in the order of the columns."""
        return asdict(self)


class Comparison(NamedTuple):
    """A table with what is behind it.

    Attributes:
        rows: The variants, dense first.
        decisions: Pruned variant -> its schedule, plan and latency.
        seconds: What profiling, planning and the final timing of all variants took.
    """

    rows: list[Row]
    decisions: dict[str, Decision]
    seconds: float


def compare(
    trainer: L.Trainer, model: L.LightningModule, pruner: TokenPruning, max_drop: float | None = None, **data: Any
) -> Comparison:
    """Validates the module dense and pruned, everything else alike.

    Args:
        trainer: Runs all validations; `pruner` must be among its callbacks.
        model: The module; dense again afterwards.
        pruner: Method, block and objective. Its objective is one variant; an accuracy budget is the other, unless
            the objective is one. If its schedule is given, that is the only pruned variant.
        max_drop: The budget: share of the dense proxy that may be lost; 0.005 if None.
        **data: `dataloaders` or `datamodule`, for `trainer.validate`.

    Raises:
        DataError: If there is nothing to validate on.
        ArgumentError: If `max_drop` is given although nothing is planned for it.
    """
    survey = Survey(pruner, _objectives(pruner, max_drop))
    settings = pruner.enabled, pruner.verbose, pruner.schedule
    callbacks = attached_callbacks(trainer)
    callbacks.append(survey)
    try:
        pruner.enabled = False
        found = {"dense": trainer.validate(model, verbose=False, **data)}
        callbacks.remove(survey)
        if not survey.decisions:
            raise DataError("The validation loader yielded no batch to compare on.")
        pruner.enabled, pruner.verbose = True, False
        for variant, decision in survey.decisions.items():
            pruner.use(decision)
            found[variant] = trainer.validate(model, verbose=False, **data)
    finally:
        if survey in callbacks:
            callbacks.remove(survey)
        pruner.enabled, pruner.verbose, pruner.schedule = settings
        pruner.decision = None
    rows = [_row(variant, survey, _flat(metrics)) for variant, metrics in found.items()]
    return Comparison(rows, survey.decisions, survey.seconds)


def _objectives(pruner: TokenPruning, max_drop: float | None) -> dict[str, Objective]:
    name = pruner.reduction.name
    given = pruner.schedule != "auto"
    if max_drop is not None and (given or isinstance(pruner.objective, AccuracyBudget)):
        why = "the schedule is given" if given else f"the objective is {pruner.objective}"
        raise ArgumentError(f"`max_drop` plays no part where {why}; got max_drop={max_drop}.")
    if isinstance(pruner.objective, AccuracyBudget):
        return {f"{name} budget": pruner.objective}
    return {
        f"{name} utility": pruner.objective,
        f"{name} budget": AccuracyBudget(0.005 if max_drop is None else max_drop),
    }


def writable(output: str | Path) -> Path:
    """The output folder, made if need be, checked before hours of work rather than after.

    Raises:
        ArgumentError: If it cannot be made or written to.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ArgumentError(f"`output` must be a folder that can be written to, got {folder}: {error}") from error


def _flat(metrics: Any) -> dict[str, float]:
    """Of several dataloaders the first counts."""
    return dict(metrics[0]) if metrics else {}


def _row(variant: str, survey: Survey, metrics: dict[str, float]) -> Row:
    timing, decision = survey.timings[variant], survey.decisions.get(variant)
    any_decision = next(iter(survey.decisions.values()))
    context = any_decision.context
    return Row(
        variant=variant,
        method=decision.method if decision else "",
        block=" ".join(str(block) for block in decision.schedule.reducing) if decision else "",
        removed=decision.schedule.total if decision else 0,
        tokens=decision.tokens if decision else any_decision.dense_tokens,
        top1=metrics.get("val/top1"),
        top5=metrics.get("val/top5"),
        latency_ms=timing.milliseconds,
        latency_spread=timing.spread,
        throughput=metrics.get("val/throughput"),
        throughput_end_to_end=metrics.get("val/throughput_end_to_end"),
        speedup=1 / timing.ratio,
        images=survey.images,
        device=context["device"],
        batch_size=context["batch_size"],
        precision=context["precision"],
    )
