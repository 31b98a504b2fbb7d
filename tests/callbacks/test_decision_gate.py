"""The ranks other than 0 wait in a gate until rank 0 has decided; here each rank is a thread."""

import threading
import time
from collections.abc import Callable
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

import lightning_prune as lp
from lightning_prune.callbacks import decision_gate
from lightning_prune.callbacks.decision_gate import DecisionGate

RANKS = 3


class Broadcast:
    """Passes a value of rank 0 on to the threads that are the other ranks."""

    def __init__(self) -> None:
        self._values: list[Queue[Any]] = [Queue() for _ in range(RANKS)]

    def trainer(self, rank: int) -> Any:
        def broadcast(value: Any) -> Any:
            if rank:
                return self._values[rank].get(timeout=10)
            for other in self._values[1:]:
                other.put(value)
            return value

        environment = SimpleNamespace(main_address="127.0.0.1")
        strategy = SimpleNamespace(broadcast=broadcast, cluster_environment=environment)
        return SimpleNamespace(strategy=strategy, is_global_zero=rank == 0, world_size=RANKS)


def on_all_ranks(work: Callable[[int, DecisionGate], Any]) -> list[Any]:
    """What each rank returns, or the error that it raises."""
    broadcast, found = Broadcast(), [None] * RANKS

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank, DecisionGate(broadcast.trainer(rank)))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_the_others_pass_when_rank_zero_has_decided_and_use_little_time() -> None:
    decided = threading.Event()

    def work(rank: int, gate: DecisionGate) -> Any:
        if rank == 0:
            time.sleep(0.8)
            decided.set()
        own = time.thread_time()
        gate.pass_through()
        return decided.is_set(), time.thread_time() - own

    for passed, seconds in on_all_ranks(work):
        assert passed
        assert seconds < 0.2


def test_rank_zero_that_ends_before_it_decides_ends_the_waiting() -> None:
    def work(rank: int, gate: DecisionGate) -> None:
        if rank == 0:  # as a process that ends, it takes the store with it
            time.sleep(0.1)
            gate._store = None
        else:
            gate.pass_through()

    first, *others = on_all_ranks(work)
    assert first is None
    assert [type(error) for error in others] == [lp.errors.PruneError] * 2
    assert all("Rank 0" in str(error) for error in others)


def test_a_store_that_cannot_be_made_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no ports are left")

    monkeypatch.setattr(decision_gate, "TCPStore", unable)
    assert on_all_ranks(lambda _, gate: gate.pass_through()) == [None] * RANKS


def test_rank_zero_does_not_wait_for_a_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_gate, "_ARRIVING", 0.3)
    assert on_all_ranks(lambda rank, gate: None if rank == 2 else gate.pass_through()) == [None] * RANKS
