"""A module and data small enough for many real Trainers, and an account of what every step saw."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
from timm.layers import LayerNorm
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from helpers.data import labelled, loader
from helpers.models import tiny_vit
from lightning_prune.callbacks import TokenPruning
from lightning_prune.planning import Utility

OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Step(NamedTuple):
    stage: str
    images: int
    tokens: int  # that left the last block


class CountedNorm(LayerNorm):
    """Calls a function with itself and its arguments before it runs; a hook is not called while a model is measured."""

    def forward(self, x: Tensor) -> Tensor:
        vars(self)["count"](self, (x,))
        return super().forward(x)


def count_forwards(norm: torch.nn.Module, count: Callable[[torch.nn.Module, tuple[Tensor]], None]) -> None:
    """Has a normalisation of timm call a function before each forward pass."""
    norm.__class__ = CountedNorm
    vars(norm)["count"] = count


def stop_counting(vit: Any) -> None:
    """Undoes `count_forwards` in all blocks: it is not for a compiler."""
    for block in vit.blocks:
        block.norm1.__class__ = LayerNorm
        vars(block.norm1).pop("count", None)


class Tiny(L.LightningModule):
    """A ViT of 17 tokens and four blocks. `steps` says what each step saw; `forwards` counts all forward passes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.vit = tiny_vit(**options).train()
        self.steps: list[Step] = []
        self.forwards = 0
        self._left = 0
        # The last block is also run on a few tokens, to see whether it can be run in two parts.
        count_forwards(self.vit.blocks[0].norm1, self._count)
        count_forwards(self.vit.blocks[-1].norm1, self._look)

    def _count(self, norm: torch.nn.Module, args: tuple[Tensor]) -> None:
        self.forwards += 1

    def _look(self, norm: torch.nn.Module, args: tuple[Tensor]) -> None:
        self._left = args[0].shape[1]

    def images(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return next(iter(batch.values()))
        return batch if isinstance(batch, Tensor) else batch[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)

    def step(self, stage: str, batch: Any) -> Tensor:
        images = self.images(batch)
        logits = self(images)
        self.steps.append(Step(stage, len(images), self._left))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step("train", batch).float().square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        stage = "sanity" if self.trainer.sanity_checking else "val"
        self.log("val/mean", self.step(stage, batch).float().mean(), batch_size=1)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.step("test", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.step("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def seen(self, stage: str = "val") -> int:
        """Images that the steps of a stage saw."""
        return sum(step.images for step in self.steps if step.stage == stage)

    def tokens(self, stage: str = "val") -> set[int]:
        """Token counts that entered the last block in the steps of a stage."""
        return {step.tokens for step in self.steps if step.stage == stage}


class Snapshot:
    """A module as it was: weights, classes of all submodules, attributes that a patch might leave, and its output."""

    def __init__(self, module: L.LightningModule, shape: tuple[int, ...] = (3, 3, 32, 32)) -> None:
        self.module = module
        self.probe = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        self.before = self._look()

    def _look(self) -> dict[str, Any]:
        training = self.module.training
        with torch.no_grad():
            output = self.module.eval()(self.probe)
        self.module.train(training)
        return {
            "state": {name: tensor.clone() for name, tensor in self.module.state_dict().items()},
            "classes": [type(part) for part in self.module.modules()],
            "attributes": [set(vars(part)) - {"_trainer", "_fabric"} for part in self.module.vit.modules()],
            "hooks": [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in self.module.modules()],
            "output": output,
        }

    def assert_unchanged(self) -> None:
        before, after = self.before, self._look()
        assert list(after["state"]) == list(before["state"])
        assert all(torch.equal(after["state"][name], tensor) for name, tensor in before["state"].items())
        assert after["classes"] == before["classes"]
        assert after["attributes"] == before["attributes"]
        assert after["hooks"] == before["hooks"]
        assert torch.equal(after["output"], before["output"])


class Stream(IterableDataset[Any]):
    """Images that come one after the other; `given` counts them."""

    def __init__(self, count: int = 24) -> None:
        self.all, self.given = labelled(count), 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.all:
            self.given += 1
            yield item


class Spying(Dataset[Any]):
    """Remembers which of its items were asked for."""

    def __init__(self, count: int = 24) -> None:
        self.all = labelled(count)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.all[index]


def pruner(**options: Any) -> TokenPruning:
    """One method in one block by the paper's utility, unless the options say otherwise; the default searches longer."""
    defaults = {"method": "pomt", "calibration": 8, "time_limit": 1.0, "verbose": False}
    chosen = {**defaults, **options}
    if chosen["method"] in ("pomt", "random") and "objective" not in options:
        chosen["objective"] = Utility(0.5)
    return TokenPruning(**chosen)


def brief(**options: Any) -> TokenPruning:
    """The same for tests that are not about measuring: every alternative once after its warm-up."""
    return pruner(time_limit=0.01, **options)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(callbacks=list(callbacks), **{**OPTIONS, **options})


def validated(callback: TokenPruning, module: L.LightningModule | None = None, data: Any = None, **options: Any) -> Any:
    """Validates once; returns the module and the trainer."""
    module = module if module is not None else Tiny()
    running = trainer(callback, **options)
    running.validate(module, data if data is not None else loader(), verbose=False)
    return module, running
