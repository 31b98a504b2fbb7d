"""The run of a comparison of methods: decide, validate one variant after another, keep what is done."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.attached import attached_callbacks
from lightning_prune.comparing.deployment import Deployment
from lightning_prune.comparing.entries import Entry, read_methods
from lightning_prune.comparing.opening import Opening
from lightning_prune.comparing.outcomes import OutcomeRecorder
from lightning_prune.comparing.planned import Decided, Planned, variant_of
from lightning_prune.comparing.row import Row, compared, flat, logged, surroundings, timed
from lightning_prune.comparing.state import Finished
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.patching import TokenTrace
from lightning_prune.planning import Utility
from lightning_prune.planning.targets import check_speedups
from lightning_prune.reduction import POMT

SPEEDUPS = (1.1, 1.25, 1.5, 2.0)
_PICTURES = 4  # images whose tokens are traced


class MethodComparison(NamedTuple):
    """A table of methods with what is behind it.

    Attributes:
        rows: The variants, dense first.
        decided: Their schedules and timings, and what cannot be reached.
        pictures: A few images of the dataset, on the CPU; empty on other ranks than 0.
        traces: Variant -> what became of their patches; one variant a method.
    """

    rows: list[Row]
    decided: Decided
    pictures: Tensor | None
    traces: dict[str, TokenTrace]


def compare_methods(
    trainer: L.Trainer,
    model: L.LightningModule,
    pruner: TokenPruning,
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
        trainer: Runs all validations; `pruner` must be among its callbacks.
        model: The module; dense again afterwards.
        pruner: Gives block, time limit, target and `images_from_batch`; and its own reduction where it is named.
        methods: Names of reductions, `auto`, `dense`, `int8`, and names of reductions with `+int8`.
        speedups: The targets; `SPEEDUPS` if None.
        output: Folder, writable.
        fresh: Forgets what is known of this question.
        tell: Says what goes on.
        **data: `dataloaders` or `datamodule`, for `trainer.validate`.

    Raises:
        ArgumentError: If a name or target is wrong, or the pruner has a schedule, an objective or a method of
            its own, which would play no part.
        UnsupportedModelError: If no method can be used with this model.
        DataError: If there is nothing to validate on.
    """
    entries = read_methods(methods, pruner.reduction)
    targets = check_speedups(list(SPEEDUPS if speedups is None else speedups))
    _refuse_idle_settings(pruner, entries)
    opening = Opening(pruner, entries, targets, output, fresh, tell, trainer.limit_val_batches)
    with _dense_but_for(trainer, pruner, opening), _one_batch(trainer):
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
            deployment = Deployment(variant_of(planned, by_name[planned.entry]), decided.dense_tokens, pruner.target)
            recorder = OutcomeRecorder(pruner.target, pruner.images_from_batch)
            with _dense_but_for(trainer, pruner, deployment, recorder):
                metrics = trainer.validate(model, verbose=False, **data)
            finished[variant] = Finished(flat(metrics), recorder.images, recorder.outcomes)
        if opening.state is not None:  # on rank 0
            opening.state.keep_finished(variant, finished[variant])
    rows = [_row(planned, decided, finished) for planned in decided.planned]
    return MethodComparison(rows, decided, opening.pictures, opening.traces)


@contextmanager
def _dense_but_for(trainer: L.Trainer, pruner: TokenPruning, *added: L.Callback) -> Iterator[None]:
    """The pruner idle and other callbacks in its place, before all others, which see the model restored in the end."""
    callbacks, enabled = attached_callbacks(trainer), pruner.enabled
    callbacks[:0] = added
    pruner.enabled = False
    try:
        yield
    finally:
        pruner.enabled = enabled
        for callback in added:
            callbacks.remove(callback)


@contextmanager
def _one_batch(trainer: L.Trainer) -> Iterator[None]:
    """Runs of one batch; of none, where the user wants none."""
    limit = trainer.limit_val_batches
    trainer.limit_val_batches = 1 if limit is None or limit > 0 else 0
    try:
        yield
    finally:
        trainer.limit_val_batches = limit


def _refuse_idle_settings(pruner: TokenPruning, entries: Sequence[Entry]) -> None:
    own = pruner.reduction
    if own != POMT() and all(entry.reduction is not own for entry in entries):
        raise ArgumentError(f"`method` plays no part unless `methods` name it; got {own!r}, which they do not.")
    idle = {
        "schedule": pruner.schedule != "auto",
        "objective": pruner.objective != Utility(),
        "protocol": pruner.protocol != "deployed",
    }
    for name, given in idle.items():
        if given:
            raise ArgumentError(
                f"`{name}` plays no part where `methods` are compared at `speedups`; got {getattr(pruner, name)!r}."
            )


def _row(planned: Planned, decided: Decided, finished: dict[str, Finished]) -> Row:
    done, dense = finished.get(planned.variant), finished["dense"]
    schedule, n = planned.schedule, decided.dense_tokens
    cut: dict[str, Any] = {}
    if schedule is not None:
        block = " ".join(map(str, schedule.reducing))
        cut = {"block": block, "removed": schedule.total, "tokens": schedule.tokens(n)[-1]}
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
        target=planned.target,
        **cut,
        **figures,
        joules_per_image=planned.joules_per_image,
        watts=planned.watts,
        note=planned.note,
        **surroundings(decided.context, done.images if done is not None else 0),
    )
