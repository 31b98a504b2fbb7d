"""Decisions that one process makes for all processes of a distributed run."""

from collections.abc import Callable
from typing import TypeVar, cast

import lightning as L

from lightning_prune.errors import PruneError, UnsupportedModelError

T = TypeVar("T")


def refuse_sharded(trainer: L.Trainer) -> None:
    """Raises if the model is sharded: a forward pass on rank 0 alone would wait for the other ranks.

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


def decide_on_rank_zero(trainer: L.Trainer, decide: Callable[[], T]) -> T:
    """Returns on every rank what `decide` returns on rank 0; an error there is raised on every rank.

    If the error were raised on rank 0 only, the other ranks would wait until the process group times out and would
    then report a closed connection.

    Args:
        trainer: Its strategy broadcasts.
        decide: Called on rank 0 only; its result must be picklable.

    Raises:
        PruneError: On the other ranks, with the message of the error that rank 0 raises as it is.
    """
    result: T | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = decide()
        except Exception as caught:
            error = caught
    message = f"{type(error).__name__} on rank 0: {error}" if error else None
    result, message = trainer.strategy.broadcast((result, message))
    if error is not None:
        raise error
    if message is not None:
        raise PruneError(message)
    return cast(T, result)
