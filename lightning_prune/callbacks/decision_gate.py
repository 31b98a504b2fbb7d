"""Waiting for rank 0 while it plans: for any time, with next to no CPU time, and open to signals."""

import time
from datetime import timedelta
from typing import Any

import lightning as L
from torch.distributed import DistError, TCPStore

from lightning_prune.errors import PruneError

_KEY = "decided"
_ARRIVALS = "arrived"
_POLLS = 0.01, 0.25  # seconds between two looks, from the first to those of a long wait
_CONNECTING = timedelta(seconds=15)
_ARRIVING = 30.0  # seconds that rank 0 waits for the others to see that it has decided


class DecisionGate:
    """Lets all ranks go on when rank 0 has decided.

    A collective operation would do as well, but for three things: it ends in an error after the timeout of the process
    group, 30 minutes in Lightning; with NCCL the waiting rank may keep a CPU core busy, which disturbs what rank 0
    times; and a signal is not handled before it ends. So the ranks other than 0 look now and then into a store on
    rank 0. Make it on every rank, before rank 0 begins to decide. A rank that cannot reach the store waits in the next
    collective operation.

    Args:
        trainer: Of this rank.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._is_zero, self._others = trainer.is_global_zero, trainer.world_size - 1
        self._store: TCPStore | None = None
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        host = "127.0.0.1" if environment is None else str(environment.main_address)
        if self._is_zero:
            self._store = _store(host, 0)
        port = trainer.strategy.broadcast(None if self._store is None else self._store.port)
        if not self._is_zero and port is not None:
            self._store = _store(host, port)

    def pass_through(self) -> None:
        """On rank 0, says that it has decided; elsewhere waits until it has.

        Raises:
            PruneError: On the other ranks, if rank 0 has ended.
        """
        store, self._store = self._store, None  # on rank 0 the store ends with it
        if store is None:
            return
        if self._is_zero:
            store.set(_KEY, "yes")
            end, pause = time.monotonic() + _ARRIVING, _POLLS[0]
            while store.add(_ARRIVALS, 0) < self._others and time.monotonic() < end:
                time.sleep(pause)
            return
        pause = _POLLS[0]
        try:
            while not store.check([_KEY]):
                time.sleep(pause)
                pause = min(2 * pause, _POLLS[1])
            store.add(_ARRIVALS, 1)
        except DistError as error:
            raise PruneError("Rank 0, which decides for all ranks, has ended before it decided.") from error


def _store(host: str, port: int) -> TCPStore | None:
    """A store that rank 0 has (`port` is 0) or that is reached there; None where that fails."""
    try:
        return TCPStore(host, port, is_master=not port, timeout=_CONNECTING, wait_for_workers=False)
    except (DistError, RuntimeError):
        return None
