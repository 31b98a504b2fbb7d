"""The same callback in Trainers of the package `pytorch_lightning`, whose classes are not those of `lightning`."""

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler

import lightning_prune as lp
from helpers.data import labelled, loader, noise_images
from helpers.models import TOKENS, tiny_vit
from lightning_prune.callbacks.batches import sampling_loader
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.callbacks.rank_agreement import refuse_sharded
from lightning_prune.patching.class_swap import is_patched_module

from .tiny import OPTIONS, brief, count_forwards

pytestmark = pytest.mark.usefixtures("clockwork")


class Theirs(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit().train()
        self.left = 0
        self.tokens: dict[str, list[int]] = {}
        count_forwards(self.vit.blocks[-1].norm1, self._count)

    def _count(self, norm: torch.nn.Module, args: tuple[Tensor]) -> None:
        self.left = args[0].shape[1]

    def step(self, stage: str, batch: Any) -> Tensor:
        logits = self.vit(batch[0])
        self.tokens.setdefault(stage, []).append(self.left)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step("fit", batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/mean", self.step("validate", batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Data(pl.LightningDataModule):
    def val_dataloader(self) -> Any:
        return loader()

    test_dataloader = predict_dataloader = train_dataloader = val_dataloader


class DoublingData(Data):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]


@pytest.mark.parametrize("data", [Data, DoublingData])
@pytest.mark.parametrize("stage", ["validate", "test", "predict", "fit"])
def test_all_loops_of_pytorch_lightning_are_pruned(stage: str, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[Any] = []
    real = FirstBatch.sample
    monkeypatch.setattr(FirstBatch, "sample", lambda *a, **k: sampled.append(real(*a, **k)) or sampled[-1])
    module, callback = Theirs(), brief()
    options = {"max_epochs": 1, "num_sanity_val_steps": 0} if stage == "fit" else {}
    running = pl.Trainer(callbacks=[callback], **OPTIONS, **options)
    getattr(running, stage)(module, datamodule=data())
    pruned = "validate" if stage == "fit" else stage
    assert module.tokens.pop(pruned) == [callback.decision.tokens] * 6
    assert module.tokens == ({"fit": [TOKENS] * 6} if stage == "fit" else {})
    assert callback.decision.tokens < TOKENS
    assert callback.decision.calibration == "8 images sampled from the dataset, seed 0"
    (sample,) = sampled
    images = {
        tuple(image.flatten()[:3].tolist()) for image in noise_images(24, seed=1) * (2 if data is DoublingData else 1)
    }
    assert {tuple(image.flatten()[:3].tolist()) for image in sample.images} <= images
    if pruned != "predict":
        assert running.callback_metrics["pruning/tokens"] == callback.decision.tokens
    assert not any(is_patched_module(part) for part in module.modules())


def test_an_error_in_a_step_restores_the_model() -> None:
    class Failing(Theirs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        pl.Trainer(callbacks=[brief(schedule=6)], **OPTIONS).validate(module, loader(), verbose=False)
    assert module.tokens == {"validate": [TOKENS - 6]}
    assert not any(is_patched_module(part) for part in module.modules())


def test_sharded_strategies_of_pytorch_lightning_are_refused() -> None:
    from pytorch_lightning import strategies

    def running(kind: type) -> Any:
        return SimpleNamespace(strategy=object.__new__(kind), world_size=2)

    refuse_sharded(running(strategies.DDPStrategy))
    for kind in (strategies.FSDPStrategy, strategies.DeepSpeedStrategy, strategies.ModelParallelStrategy):
        with pytest.raises(lp.UnsupportedModelError, match=f"{kind.__name__} with 2 processes"):
            refuse_sharded(running(kind))


def test_distributed_loaders_of_pytorch_lightning_are_sampled() -> None:
    from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
    from pytorch_lightning.overrides.distributed import (
        UnrepeatedDistributedSampler,
        UnrepeatedDistributedSamplerWrapper,
    )

    data, ranks = labelled(), {"num_replicas": 2, "rank": 0}
    whole = RandomSampler(data)
    for sampler in (
        UnrepeatedDistributedSampler(data, **ranks),
        UnrepeatedDistributedSamplerWrapper(whole, **ranks),
        DistributedSamplerWrapper(whole, **ranks),
    ):
        found = sampling_loader(loader(sampler=sampler), 8, 0)
        assert found is not None
        assert len(found.dataset) == 8
    part = DistributedSamplerWrapper(SubsetRandomSampler(range(8)), **ranks)
    assert sampling_loader(loader(sampler=part), 8, 0) is None


def test_a_sampler_of_the_user_with_a_name_of_lightning_is_not_sampled() -> None:
    class SequentialSampler(torch.utils.data.SequentialSampler):
        def __iter__(self) -> Any:
            return iter(range(0, 24, 3))

    assert sampling_loader(loader(sampler=SequentialSampler(labelled())), 8, 0) is None
