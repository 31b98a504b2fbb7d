"""The columns of a row are of the same images, of logits and of labels; what cannot be had is left out and said."""

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
from lightning_prune.comparison.first_loader import FirstLoader
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant
from lightning_prune.comparison.predictions import Predictions
from lightning_prune.comparison.resume import VariantResult
from lightning_prune.comparison.variant_rows import paired_columns, row_of, unpaired_reason
from lightning_prune.profiling import LatencyStats

IMAGES = noise_images(24)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    set_latency(monkeypatch, lambda _: 1e-3, runs=False)


def lively(num_classes: int) -> nn.Module:
    """A tiny model that has all classes among its predictions; some change where tokens are removed."""
    net = tiny_vit(num_classes=num_classes, noise=0.1).eval()
    if num_classes:
        centre(net.head, net)
    return net


@torch.no_grad()
def centre(head: nn.Module, net: nn.Module) -> None:
    head.bias -= net(IMAGES).mean(0)


def compared(running: Any, module: L.LightningModule, loaders: Any) -> Any:
    trainer, _ = running(schedule=8, method="pomt", limit_val_batches=1.0, cache_dir=None)
    return lp.compare(trainer, module, loaders, clock=TickingClock())


def loader(*parts: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*parts), batch_size=8)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_fewer_than_three_rounds_have_no_spread_which_the_row_says(rounds: int) -> None:
    timing = LatencyStats(10.0, 0.0, 0.5, 0.0, rounds, 10.0, 9.5, 10.5)
    planned = PlannedVariant("dense", "dense", timing=timing)
    context = {"device": "Abacus", "batch_size": 8, "precision": "float32"}
    plan = ComparisonPlan([planned], [], context, 17, "n/a", 1.0, "now")
    row = row_of(planned, plan, {"dense": VariantResult({}, 8, None)})
    assert (row.latency_ms, row.speedup) == (10.0, 2.0)
    known = (row.latency_low_ms, row.latency_high_ms, row.latency_spread, row.speedup_spread)
    assert known == ((None,) * 4 if rounds < 3 else (9.5, 10.5, 0.0, 0.0))
    assert row.note == {1: "timed in 1 round only", 2: "timed in 2 rounds only", 3: ""}[rounds]


class Loaders(L.LightningDataModule):
    def __init__(self, loaders: Any) -> None:
        super().__init__()
        self.loaders = loaders

    def val_dataloader(self) -> Any:
        return self.loaders


class OwnLoaders(lp.ImageClassifier):
    loaders: Any = None

    def val_dataloader(self) -> Any:
        return self.loaders


class PerLoader(L.LightningModule):
    """Logs as Lightning does, a figure for each loader; needs its number or not."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.log("val/top1", (self(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.filterwarnings("ignore:There are 2 validation loaders")
@pytest.mark.parametrize("given", ["list", "datamodule", "module", "an index is needed"])
def test_of_two_loaders_all_columns_are_of_the_first(given: str, running: Any) -> None:
    net = lively(5)
    with torch.no_grad():
        right = net(IMAGES).argmax(1)
    loaders = [loader(IMAGES[:16], right[:16]), loader(IMAGES[16:], (right[16:] + 1) % 5)]
    module: Any = {"module": OwnLoaders, "an index is needed": PerLoader}.get(given, lp.ImageClassifier)(net)
    data: Any = loaders
    if given == "datamodule":
        data = Loaders(loaders)
    elif given == "module":
        module.loaders, data = loaders, None
    found = compared(running, module, data)
    dense, pruned = found.rows
    with torch.no_grad(), lp.patch(net, "pomt", 8):
        expected = float((net(IMAGES[:16]).argmax(1) == right[:16]).float().mean())
    assert expected < 1
    assert (dense.top1, dense.images, pruned.images) == (1.0, 16, 16)
    assert pruned.top1 == pytest.approx(expected)
    assert pruned.top1_change == pytest.approx(expected - 1)
    assert pruned.agreement == pytest.approx(expected)
    assert ("first of 2 validation loaders" in dense.note) == (given != "an index is needed")
    for source in (data, module):
        assert "val_dataloader" not in vars(source) if hasattr(source, "val_dataloader") else True


def test_several_loaders_are_said_and_one_is_left_as_it_is() -> None:
    module, one = L.LightningModule(), loader(IMAGES)
    with FirstLoader(module, one).arguments() as arguments:
        assert arguments == {"dataloaders": one}
    first = FirstLoader(module, {"a": one, "b": loader(IMAGES)})
    with pytest.warns(UserWarning, match="2 validation loaders"), first.arguments() as arguments:
        assert arguments == {"dataloaders": one}
    assert first.loaders == 2


def test_a_pooled_accuracy_is_not_put_beside_changes_of_one_loader() -> None:
    dense = VariantResult({"val/top1": 0.5}, 4, Predictions([0, 1, 2, 3], [0, 1, 2, 3]))
    other = VariantResult({"val/top1": 0.75}, 4, Predictions([0, 1, 2, 2], [0, 1, 2, 3]))
    assert unpaired_reason(other) == ""
    assert "50.00%" in unpaired_reason(dense)
    assert "100.00%" in unpaired_reason(dense)
    assert paired_columns(dense, other) == {}
    assert paired_columns(other, other)["agreement"] == 1.0


class Separate(L.LightningModule):
    """The step calls the head; `forward` returns what `features` makes of the output of the transformer."""

    metric = "val/top1"

    def __init__(self, features: Callable[[nn.Module], nn.Module] = lambda _: nn.Identity(), width: int = 32) -> None:
        super().__init__()
        self.encoder = lively(0)
        self.features = features(self.encoder)
        self.head: nn.Module = nn.Linear(width, 5)
        centre(self.head, nn.Sequential(self.encoder, self.features, self.head))

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.encoder(images))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log(self.metric, (self.head(self(batch[0])).argmax(1) == batch[-1]).float().mean())


@pytest.mark.parametrize(
    "module",
    [Separate(), Separate(lambda _: nn.LayerNorm(32)), Separate(lambda _: nn.Linear(32, 16), 16)],
    ids=["features", "normalised", "projected"],
)
@pytest.mark.parametrize("metric", ["val/top1", "val/accuracy"])
def test_features_are_not_taken_for_logits(module: Any, metric: str, running: Any) -> None:
    with torch.no_grad():
        labels = module.head(module.eval()(IMAGES)).argmax(1)
    module.metric = metric
    dense, pruned = compared(running, module, loader(IMAGES, labels)).rows
    assert (dense.top1 or dense.metric) == 1.0
    assert (pruned.top1_change, pruned.top1_low, pruned.top1_high, pruned.agreement) == (None,) * 4
    assert "no agreement" in dense.note
    assert pruned.note == ""


class Indexed(PerLoader):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/top1", (self(batch[0]).argmax(1) == batch[-1]).float().mean())


@pytest.mark.parametrize("highest", [24, 3], ids=["out of range", "in range"])
@pytest.mark.parametrize("parts", [2, 3])
def test_an_index_is_not_taken_for_the_label(highest: int, parts: int, running: Any) -> None:
    module = Indexed(lively(5)).eval()
    with torch.no_grad():
        labels = module(IMAGES).argmax(1)
    index = torch.arange(24) % highest
    if parts == 2:  # a batch of (image, index), where the module has the labels elsewhere

        class Elsewhere(Indexed):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                right = labels[8 * batch_idx : 8 * batch_idx + 8]
                self.log("val/top1", (self(batch[0]).argmax(1) == right).float().mean())

        module.__class__ = Elsewhere
    data = loader(IMAGES, index, labels) if parts == 3 else loader(IMAGES, index)
    dense, pruned = compared(running, module, data).rows
    assert (dense.top1, pruned.top1_change, pruned.top1_low, pruned.top1_high) == (1.0, None, None, None)
    assert "by the same images" in dense.note
    # Classes by a head of the transformer are certain, unless the labels seem known and give another accuracy.
    certain = parts == 3 or highest == 24
    assert (pruned.agreement is not None) == certain
    if certain:
        assert pruned.agreement == pytest.approx(pruned.top1)


class Stated(Separate):
    """Says how many classes there are, and returns logits of as many."""

    def __init__(self) -> None:
        super().__init__(lambda _: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)), 5)
        centre(self.features[-1], nn.Sequential(self.encoder, self.features))
        self.num_classes = 5
        self.head = nn.Identity()


@pytest.mark.parametrize("kind", [Stated, "metric"])
def test_classes_that_a_module_states_are_compared(kind: Any, running: Any) -> None:
    module = Stated().eval()
    with torch.no_grad():
        labels = module(IMAGES).argmax(1)
    if kind == "metric":
        from torchmetrics.classification import MulticlassAccuracy

        del module.num_classes
        module.accuracy = MulticlassAccuracy(5)
    dense, pruned = compared(running, module, loader(IMAGES, labels)).rows
    assert (dense.top1, dense.note) == (1.0, "")
    assert pruned.top1_change == pytest.approx(pruned.top1 - 1)
    assert pruned.agreement == pytest.approx(pruned.top1)
