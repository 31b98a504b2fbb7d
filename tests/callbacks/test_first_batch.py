"""Work on the first validation batch: refused where the model is spread, and an error of rank 0 reaches every rank."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

import lightning_prune as lp
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.first_batch import _FirstBatchCallback
from lightning_prune.errors import PruneError


class Broadcasting(DDPStrategy):
    """A second rank, which is told what the first would have sent."""

    def __init__(self, told: Any) -> None:
        self.told = told

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return None if obj is None else self.told  # there is no store to wait in


def running(strategy: Any, rank: int) -> Any:
    precision = SimpleNamespace(forward_context=nullcontext)
    return SimpleNamespace(
        strategy=strategy, world_size=2, is_global_zero=rank == 0, precision_plugin=precision, sanity_checking=False
    )


def probe(images_from_batch: Any = None) -> _FirstBatchCallback[int]:
    config = PruningConfig(images_from_batch=images_from_batch)
    return _FirstBatchCallback(config, lambda first: len(first.images))


def test_a_sharded_model_is_refused() -> None:
    trainer = running(object.__new__(FSDPStrategy), rank=0)
    with pytest.raises(lp.UnsupportedModelError, match="FSDPStrategy with 2 processes"):
        probe().on_validation_batch_start(trainer, L.LightningModule(), torch.zeros(2, 3, 8, 8), 0)


def test_an_error_of_images_from_batch_on_rank_0_is_raised_on_every_rank() -> None:
    """A rank that fails by itself would leave the others waiting."""
    asked: list[Any] = []

    def nowhere(batch: Any) -> Any:
        asked.append(batch)
        raise KeyError("pixels")

    trainer = running(Broadcasting((None, "KeyError on rank 0: 'pixels'", True)), rank=1)
    with pytest.raises(PruneError, match="KeyError on rank 0: 'pixels'"):
        probe(nowhere).on_validation_batch_start(trainer, L.LightningModule(), {}, 0)
    assert not asked


def test_the_other_ranks_receive_the_result_of_rank_0() -> None:
    other = probe()
    other.on_validation_batch_start(running(Broadcasting((7, None, True)), rank=1), L.LightningModule(), {}, 0)
    assert other.results == [7]
