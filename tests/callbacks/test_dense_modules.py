"""`TokenPruning(restore=...)` on LightningModules with a dense head."""

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from helpers.data import noise_images
from helpers.dense import CalledDenseModule, DenseModule, dense_net
from lightning_prune.callbacks import TokenPruning
from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.class_swap import is_patched_module

from .tiny import OPTIONS

SCHEDULE = lp.Schedule([0, 5, 0, 3], method="topk")

pytestmark = pytest.mark.usefixtures("clockwork")


def data(count: int = 12) -> DataLoader[Any]:
    return DataLoader(TensorDataset(noise_images(count), noise_images(count, 1, 4, seed=2)), batch_size=4)


def validated(module: L.LightningModule, callback: TokenPruning | None) -> float:
    trainer = L.Trainer(callbacks=[] if callback is None else [callback], **OPTIONS)
    return float(trainer.validate(module, data(), verbose=False)[0]["val/mse"])


@torch.no_grad()
def by_hand(module: DenseModule, schedule: Any) -> float:
    errors = []
    with lp.patch(module, schedule, restore="auto"):
        for images, targets in data():
            shifted = images - 0.5 if isinstance(module, CalledDenseModule) else images
            errors.append(float((module.net(shifted) - targets).square().mean()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("kind", [DenseModule, CalledDenseModule])
def test_a_given_schedule(kind: type[DenseModule]) -> None:
    module = kind(dense_net())
    dense = validated(module, None)
    callback = TokenPruning(schedule=SCHEDULE, restore="auto", verbose=False, time_limit=5)
    assert validated(module, callback) == pytest.approx(by_hand(module, SCHEDULE), rel=1e-5)
    assert validated(module, None) == dense != pytest.approx(by_hand(module, SCHEDULE), rel=1e-5)
    assert not any(is_patched_module(each) for each in module.modules())


@pytest.mark.parametrize("kind", [DenseModule, CalledDenseModule])
def test_a_planned_schedule(kind: type[DenseModule]) -> None:
    module = kind(dense_net())
    callback = TokenPruning(
        method="topk", objective=lp.LatencyBudget(speedup=1.2), restore="auto", verbose=False, use_cache=False
    )
    found = validated(module, callback)
    decision = callback.decision
    assert decision is not None
    assert decision.plan is not None
    assert decision.plan.proxy == "cosine similarity per patch"
    assert decision.schedule.total_removed > 0
    assert found == pytest.approx(by_hand(module, decision.schedule), rel=1e-5)
    assert not any(is_patched_module(each) for each in module.modules())


def test_without_restore_a_grid_raises() -> None:
    with pytest.raises(UnsupportedModelError, match="restore"):
        validated(DenseModule(dense_net()), TokenPruning(schedule=SCHEDULE, verbose=False, time_limit=5))
