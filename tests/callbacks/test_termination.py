"""SIGTERM while a first batch is planned: the work ends at once, and all is as before."""

import signal
import threading
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_prune as lp
from helpers.models import digits_module
from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.termination import ended_by_sigterm
from lightning_prune.profiling import InterleavedTimer


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[list[int]]:
    """A handler of before, which would not end anything: signals that it gets."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_the_handler_of_before_is_called_and_put_back(own_handler: list[int]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException) as ended, ended_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert own_handler == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is handler
    with ended_by_sigterm():
        pass
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with ended_by_sigterm():
        signal.raise_signal(signal.SIGTERM)


def test_an_ignored_signal_stays_ignored_below_lightnings_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    class Sending(L.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            with ended_by_sigterm():
                signal.raise_signal(signal.SIGTERM)

    module = digits_module(shape={"depth": 1, "embed_dim": 16, "num_heads": 2})
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 1}
    trainer = L.Trainer(accelerator="cpu", callbacks=[Sending()], **options)
    trainer.validate(module, lp.DigitsData(batch_size=4), verbose=False)
    assert trainer.received_sigterm


def test_nothing_changes_in_other_threads(own_handler: list[int]) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with ended_by_sigterm():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_planning_ends_and_the_model_is_as_before(monkeypatch: pytest.MonkeyPatch, own_handler: list[int]) -> None:
    module = digits_module(shape={"depth": 4, "embed_dim": 16, "num_heads": 2})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    forwards = [vars(each).get("forward") for each in module.modules()]
    calls: list[Any] = []
    once = InterleavedTimer.once

    def sending(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return once(self, *args, **kwargs)

    monkeypatch.setattr(InterleavedTimer, "once", sending)
    pruner = TokenPruning("topk", time_limit=60, calibration=4, verbose=False, use_cache=False)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 2}
    trainer = L.Trainer(accelerator="cpu", callbacks=[pruner], **options)
    with pytest.raises(SIGTERMException):
        trainer.validate(module, lp.DigitsData(batch_size=4), verbose=False)
    assert len(calls) == 2, "nothing was measured after the signal"
    assert own_handler == [signal.SIGTERM]
    assert [vars(each).get("forward") for each in module.modules()] == forwards
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
