"""A device that works at a fixed price, and a small module with the digits' data."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest

import lightning_prune as lp
from helpers.clock import TokenClock, set_few_rounds, set_latency
from helpers.models import DEPTH, digits_module
from lightning_prune.callbacks import TokenPruning
from lightning_prune.profiling import Variant

OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "limit_val_batches": 2,
}


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond for each token that leaves a block, a fifth more in 8 bits; no forward pass is run for it."""

    def seconds(alternative: Any) -> float:
        if isinstance(alternative, int):  # of the latency profile
            return 1e-3 * alternative * DEPTH
        if alternative == "dense":  # whether a kept profile still holds
            return 1e-3 * 197 * DEPTH
        assert isinstance(alternative, Variant)
        schedule = alternative.schedule
        counts = schedule.tokens(197) if isinstance(schedule, lp.Schedule) else (197,) * DEPTH
        if alternative.reduction is not None and schedule is None:
            counts = (100,) * DEPTH
        return 1e-3 * sum(counts) * (1.2 if alternative.weights else 1.0)

    set_latency(monkeypatch, seconds, runs=False)


@pytest.fixture
def module() -> Callable[..., lp.ImageClassifier]:
    return digits_module


class Clocked(TokenClock):
    """A clock that stands in a model, which is found there and not copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Clocked":
        return self


@pytest.fixture
def clocked_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Models whose blocks take 0.5 ms for each token that leaves them; `clock_of` is their clock."""
    set_few_rounds(monkeypatch)

    def make(kind: type[lp.ImageClassifier] = lp.ImageClassifier) -> lp.ImageClassifier:
        model: lp.ImageClassifier = digits_module(kind)
        vars(model.model)["clock"] = Clocked(model.model.blocks, 5e-4)
        return model

    return make


def clock_of(module: L.LightningModule) -> Callable[[], float]:
    """The clock of a module that `clocked_module` made, or of the part of it that it made."""
    clock: Callable[[], float] = next(m.clock for m in module.modules() if hasattr(m, "clock"))
    return clock


@pytest.fixture
def running() -> Callable[..., tuple[L.Trainer, TokenPruning]]:
    def make(**settings: Any) -> tuple[L.Trainer, TokenPruning]:
        options = {key: settings.pop(key) for key in list(settings) if key in OPTIONS}
        pruner = TokenPruning(**{"method": "pomt", "time_limit": 60, "verbose": False, **settings})
        return L.Trainer(callbacks=[pruner], **{**OPTIONS, **options}), pruner

    return make
