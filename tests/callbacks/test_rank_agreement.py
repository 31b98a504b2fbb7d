from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

import lightning_prune as lp
from helpers.data import noise_images
from lightning_prune.callbacks.rank_agreement import on_rank_zero, refuse_sharded

from .tiny import Tiny, pruner, trainer


def test_on_rank_zero_in_one_process_returns_the_result_or_raises_the_error() -> None:
    value = object()
    assert on_rank_zero(trainer(), lambda: value) is value
    assert on_rank_zero(trainer(), lambda: None) is None

    def fail() -> None:
        raise KeyError("as it was")

    with pytest.raises(KeyError, match="as it was"):
        on_rank_zero(trainer(), fail)


def test_on_rank_zero_lets_keyboard_interrupt_pass() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_rank_zero(trainer(), interrupt)


def running(kind: type, ranks: int) -> Any:
    """As much of a trainer as is looked at first; some strategies cannot be made without what they need."""
    stage = {"sanity_checking": False, "testing": False, "predicting": False, "num_val_batches": [1]}
    return SimpleNamespace(strategy=object.__new__(kind), world_size=ranks, callbacks=[], **stage)


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharded_strategies_are_refused_before_the_model_runs(kind: type) -> None:
    module = Tiny()
    with pytest.raises(lp.UnsupportedModelError, match=f"{kind.__name__} with 2 processes"):
        pruner().on_validation_batch_start(running(kind, 2), module, noise_images(4, seed=1), 0)
    assert module.forwards == 0


@pytest.mark.parametrize(("kind", "ranks"), [(DDPStrategy, 2), (SingleDeviceStrategy, 1), (FSDPStrategy, 1)])
def test_strategies_with_whole_models_are_accepted(kind: type, ranks: int) -> None:
    refuse_sharded(running(kind, ranks))
