"""Deciding once for all processes of a distributed run."""

from collections.abc import Callable
from typing import TypeVar, cast

import lightning as L

from lightning_prune.errors import PruneError, UnsupportedModelError

T = TypeVar("T")


def refuse_sharded(trainer: L.Trainer) -> None:
    """Refuses a model that is spread over processes: its forward pass on rank 0 alone would wait for the others.

    Raises:
        UnsupportedModelError: On every rank.
    """
    strategy = trainer.strategy
    names = {kind.__name__ for kind in type(strategy).__mro__}  # by name: pytorch_lightning has classes of its own
    whole = "DDPStrategy" in names and "DeepSpeedStrategy" not in names  # the latter is derived from the former
    if trainer.world_size > 1 and not whole:
        raise UnsupportedModelError(
            f"TokenPruning needs the whole model in each process, which {type(strategy).__name__} with "
            f"{trainer.world_size} processes does not promise; evaluate with strategy='ddp' or on one device."
        )


def decided_by_rank_zero(trainer: L.Trainer, decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank; an error there is raised on every rank.

    Without passing the error on, the other ranks would wait until the process group times out, and then report only a
    closed connection.

    Args:
        trainer: Its strategy broadcasts.
        decide: Called on rank 0 only; its result must pickle.

    Raises:
        PruneError: On the other ranks, with the message of the error that rank 0 raises as it is.
    """
    outcome: T | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            outcome = decide()
        except Exception as caught:
            error = caught
    told = f"{type(error).__name__} on rank 0: {error}" if error else None
    outcome, told = trainer.strategy.broadcast((outcome, told))
    if error is not None:
        raise error
    if told is not None:
        raise PruneError(told)
    return cast(T, outcome)
