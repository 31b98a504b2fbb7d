"""A device that works at a fixed price, and a small module with the digits' data."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest

import lightning_prune as lp
from helpers.clock import set_latency
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


@pytest.fixture
def running() -> Callable[..., tuple[L.Trainer, TokenPruning]]:
    def make(**settings: Any) -> tuple[L.Trainer, TokenPruning]:
        options = {key: settings.pop(key) for key in list(settings) if key in OPTIONS}
        pruner = TokenPruning(**{"method": "pomt", "time_limit": 1, "verbose": False, **settings})
        return L.Trainer(callbacks=[pruner], **{**OPTIONS, **options}), pruner

    return make
