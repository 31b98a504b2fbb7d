"""Dense against pruned on the same data, device and clock: the rows of one honest table."""

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.attached import attached_callbacks
from lightning_prune.callbacks.decision import Decision
from lightning_prune.comparing.outcomes import OutcomeRecorder, Outcomes
from lightning_prune.comparing.row import Row, compared, flat, logged, surroundings, timed
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.planning import AccuracyBudget, Objective
from lightning_prune.survey import Survey

__all__ = ["Comparison", "Row", "compare", "writable"]


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
    recorder = OutcomeRecorder(pruner.target, pruner.images_from_batch)
    settings = pruner.enabled, pruner.verbose, pruner.schedule
    callbacks = attached_callbacks(trainer)
    callbacks += [survey, recorder]
    try:
        pruner.enabled = False
        found = {"dense": trainer.validate(model, verbose=False, **data)}
        outcomes = {"dense": recorder.outcomes}
        callbacks.remove(survey)
        if not survey.decisions:
            raise DataError("The validation loader yielded no batch to compare on.")
        pruner.enabled, pruner.verbose = True, False
        for variant, decision in survey.decisions.items():
            pruner.use(decision)
            found[variant] = trainer.validate(model, verbose=False, **data)
            outcomes[variant] = recorder.outcomes
    finally:
        for callback in (survey, recorder):
            if callback in callbacks:
                callbacks.remove(callback)
        pruner.enabled, pruner.verbose, pruner.schedule = settings
        pruner.decision = None
    rows = [_row(variant, survey, flat(metrics), outcomes) for variant, metrics in found.items()]
    return Comparison(rows, survey.decisions, survey.seconds)


def _objectives(pruner: TokenPruning, max_drop: float | None) -> dict[str, Objective]:
    name = pruner.label
    given = pruner.schedule != "auto"
    if max_drop is not None and (given or isinstance(pruner.objective, AccuracyBudget)):
        why = "the schedule is given" if given else f"the objective is {pruner.objective}"
        raise ArgumentError(f"`max_drop` plays no part where {why}; got max_drop={max_drop}.")
    if isinstance(pruner.objective, AccuracyBudget):
        return {f"{name} budget": pruner.objective}
    return {
        f"{name} {_kind(pruner.objective)}": pruner.objective,
        f"{name} budget": AccuracyBudget(0.005 if max_drop is None else max_drop),
    }


def _kind(objective: Objective) -> str:
    """What an objective is, in words: of `LatencyBudget` "latency budget"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(objective).__name__).lower()


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


def _row(variant: str, survey: Survey, metrics: dict[str, float], outcomes: dict[str, Outcomes | None]) -> Row:
    timing, decision = survey.timings[variant], survey.decisions.get(variant)
    any_decision = next(iter(survey.decisions.values()))
    figures: dict[str, Any] = timed(timing) | logged(metrics)
    if variant != "dense":
        figures |= compared(outcomes["dense"], outcomes[variant])
    return Row(
        variant=variant,
        method=decision.method if decision else "",
        block=" ".join(str(block) for block in decision.schedule.reducing) if decision else "",
        removed=decision.schedule.total if decision else 0,
        tokens=decision.tokens if decision else any_decision.dense_tokens,
        **figures,
        **surroundings(any_decision.context, survey.images),
    )
