"""A variant whose outputs are NaN or infinite has no accuracy, which its row says; the others are compared."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from helpers.clock import TickingClock, set_latency
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.comparison.predictions import PredictionRecorder
from lightning_prune.reduction import RandomDrop
from lightning_prune.reduction.base import ReductionOutput, TokenSequence

IMAGES = noise_images(24)
LABELS = torch.arange(24) % 5
OPTIONS: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


class Broken(RandomDrop):
    """Divides by nothing in some images."""

    name = "broken"

    def __init__(self, value: float = float("nan")) -> None:
        super().__init__()
        self.value = value

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        found = super().reduce(sequence, remove)
        some = (1e4 * sequence.tokens[:, :1, :1]).sin() > 0.5
        return found._replace(tokens=torch.where(some, torch.full_like(found.tokens, self.value), found.tokens))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    set_latency(monkeypatch, lambda _: 1e-3, runs=False)


def loader(*parts: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*parts), batch_size=8)


class Own(L.LightningModule):
    """Looks at nothing, and its accuracy of broken outputs is a figure like any other."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/top1", (self(batch[0]).argmax(1) == batch[1]).float().mean())


def net() -> nn.Module:
    return tiny_vit(num_classes=5, noise=0.5).eval()


def broken_images(model: nn.Module, method: Any) -> list[int]:
    with torch.no_grad(), lp.patch(model, method, 8):
        return [image for image, row in enumerate(model(IMAGES)) if not row.isfinite().all()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [lp.ImageClassifier, Own])
def test_a_variant_without_accuracy_says_how_many_images_and_which(
    kind: Callable[[nn.Module], L.LightningModule], value: float, running: Any
) -> None:
    module = kind(net())
    expected = broken_images(module, Broken(value))
    assert 0 < len(expected) < 24
    trainer, _ = running(schedule=8, method=Broken(value), limit_val_batches=1.0, cache_dir=None)
    dense, row = lp.compare(trainer, module, loader(IMAGES, LABELS), clock=TickingClock()).rows
    assert (dense.top1, dense.note) == (pytest.approx(dense.top1), "")
    assert (row.top1, row.top1_change, row.top1_low, row.agreement, row.top5) == (None,) * 5
    assert (row.speedup, row.images) == (pytest.approx(1.0), 24)
    listed = ", ".join(map(str, expected[:5]))
    assert f"NaN or infinite outputs for {len(expected)} of 24 images ({listed}" in row.note
    assert getattr(module, "evaluation", None) is None or module.evaluation.refuses_broken


@pytest.mark.parametrize("kind", [lp.ImageClassifier, Own])
def test_a_dense_model_without_accuracy_is_an_error(kind: Any, running: Any) -> None:
    model = net()
    model.head.bias.data[2] = float("nan")
    trainer, _ = running(schedule=8, method="topk", limit_val_batches=1.0, cache_dir=None)
    with pytest.raises(lp.DataError, match=r"finite, got NaN or infinit"):
        lp.compare(trainer, kind(model), loader(IMAGES, LABELS), clock=TickingClock())


def test_classes_that_are_masked_out_are_not_broken() -> None:
    """A head may give some classes minus infinity: the best class is known."""
    model = net()
    model.head.bias.data[2] = -float("inf")
    recorder = PredictionRecorder()
    L.Trainer(callbacks=[recorder], **OPTIONS).validate(Own(model), loader(IMAGES, LABELS), verbose=False)
    assert recorder.broken == []
    assert 2 not in recorder.predictions.predicted
    model.head.bias.data[:] = -float("inf")
    L.Trainer(callbacks=[recorder], **OPTIONS).validate(Own(model), loader(IMAGES, LABELS), verbose=False)
    assert recorder.broken == list(range(24))
