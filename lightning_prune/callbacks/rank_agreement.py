"""Rank 0 decides and all ranks of a process group do the same: the result, or the same error."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import lightning as L

from lightning_prune.callbacks.decision_gate import DecisionGate
from lightning_prune.callbacks.termination import ended_by_sigterm
from lightning_prune.errors import DataError, PruneError, UnsupportedModelError

T = TypeVar("T")


def refuse_sharded(trainer: L.Trainer) -> None:
    """Refuses strategies that shard the model: a forward pass on rank 0 alone would wait for the other ranks.

    Args:
        trainer: Whose strategy it is.

    Raises:
        UnsupportedModelError: On every rank.
    """
    strategy = trainer.strategy
    names = {kind.__name__ for kind in type(strategy).__mro__}  # names, because pytorch_lightning has its own classes
    is_whole = "DDPStrategy" in names and "DeepSpeedStrategy" not in names  # the latter is derived from the former
    if trainer.world_size > 1 and not is_whole:
        raise UnsupportedModelError(
            f"TokenPruning needs the whole model in each process, which {type(strategy).__name__} with "
            f"{trainer.world_size} processes does not promise; evaluate with strategy='ddp' or on one device."
        )


def refuse_spawned(trainer: L.Trainer) -> None:
    """Refuses strategies that run in processes of their own, such as `ddp_spawn`: this process would learn no results.

    Args:
        trainer: Whose strategy it is.

    Raises:
        UnsupportedModelError: Before any process is started.
    """
    strategy = trainer.strategy
    kinds = {kind.__name__ for kind in type(strategy.launcher).__mro__}  # names, as above
    if "_MultiProcessingLauncher" in kinds:
        raise UnsupportedModelError(
            f"The results must be known in the process that asks for them, and {type(strategy).__name__} runs in "
            "processes of its own here (`ddp_spawn`, `ddp_fork`, `ddp_notebook`); use strategy='ddp' in a script, or "
            "one device."
        )


class _Outcome(NamedTuple):
    """What rank 0 tells the others: the result, or the message of an error, or that it has no batch."""

    result: Any = None
    message: str | None = None
    has_batch: bool = True


def _from_rank_zero(trainer: L.Trainer, outcome: _Outcome, has_batch: bool) -> Any:
    """The result of rank 0, on every rank.

    Args:
        trainer: Of this rank.
        outcome: That of this rank; counts on rank 0.
        has_batch: Whether this rank has a batch.

    Raises:
        DataError: On every rank, if rank 0 has no batch and another rank has.
        PruneError: On ranks other than 0, if there was an error on rank 0.
    """
    result, message, decided = trainer.strategy.broadcast(outcome)
    if not decided:
        if trainer.strategy.reduce_boolean_decision(has_batch, all=False):
            raise DataError(
                "The loader must yield at least one batch on rank 0, which decides for all ranks, got none there and "
                "batches on other ranks."
            )
        return None
    if message is not None and not trainer.is_global_zero:
        raise PruneError(message)
    return result


def on_rank_zero(trainer: L.Trainer, decide: Callable[[], T]) -> T:
    """Returns on every rank what `decide` returns on rank 0; an error there is raised on every rank.

    If the error were raised on rank 0 only, the other ranks would wait until the process group times out and would
    then report a closed connection. They wait in `DecisionGate`, however long it takes. SIGTERM ends work and waiting
    at once.

    Args:
        trainer: Of this rank.
        decide: Called on rank 0 only; its result must be picklable.

    Raises:
        DataError: If rank 0 has no batch.
        PruneError: On the other ranks, with the message of the error that rank 0 raises as it is, or if it has ended.
    """
    if trainer.world_size == 1:
        with ended_by_sigterm():
            return decide()
    result: T | None = None
    error: Exception | None = None
    gate = DecisionGate(trainer)
    with ended_by_sigterm():
        if trainer.is_global_zero:
            try:
                result = decide()
            except Exception as caught:
                error = caught
        gate.pass_through()
    message = f"{type(error).__name__} on rank 0: {error}" if error else None
    outcome = _from_rank_zero(trainer, _Outcome(result, message), has_batch=True)
    if error is not None:
        raise error
    return cast(T, outcome)


def join_decision(trainer: L.Trainer) -> Any:
    """Takes part in `on_rank_zero` on a rank whose loaders yielded no batch.

    Streams may be divided so that a rank gets none. Without this the other ranks would wait in `on_rank_zero` while
    this one is in the next collective operation, and the run would end in an error of the process group. Call it in
    `on_*_epoch_end`, which is the first hook of that rank after the others have decided.

    Args:
        trainer: Of this rank.

    Returns:
        What rank 0 decided; None if no rank has a batch, or there is one process.

    Raises:
        DataError: On every rank, if rank 0 has no batch and another rank has.
        PruneError: On ranks other than 0, if there was an error on rank 0.
        UnsupportedModelError: If the strategy shards the model.
    """
    if trainer.world_size == 1:
        return None
    refuse_sharded(trainer)
    DecisionGate(trainer).pass_through()
    return _from_rank_zero(trainer, _Outcome(has_batch=False), has_batch=False)
