"""Changes of single classes: of pairs that a plain loop finds, named, and written where asked for."""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_prune as lp
from helpers.clock import TickingClock
from helpers.models import digits_module
from lightning_prune.comparison import read_results
from lightning_prune.comparison.class_changes import changes_by_class, names_of_classes
from lightning_prune.comparison.paired_statistics import paired_interval
from lightning_prune.comparison.predictions import Predictions


def test_changes_are_those_of_a_plain_loop_over_the_images_of_a_class() -> None:
    draw = random.Random(0)
    labels = [draw.choice([0, 1, 1, 7]) for _ in range(60)]
    dense, variant = (Predictions([draw.choice([0, 1, 7]) for _ in labels], labels) for _ in range(2))
    found = changes_by_class(dense, variant, {7: "seven"})
    assert {each.label: each.name for each in found} == {0: "0", 1: "1", 7: "seven"}
    for each in found:
        gained = lost = images = right = 0
        for label, before, after in zip(labels, dense.predicted, variant.predicted, strict=True):
            images += label == each.label
            right += label == each.label == before
            gained += label == each.label == after != before
            lost += label == each.label == before != after
        assert (each.images, each.dense) == (images, right / images)
        assert (each.change, each.low, each.high) == paired_interval(gained, lost, images)
        assert each.to_dict()["certain"] is (each.high < 0 or each.low > 0)
    assert [each.change for each in found] == sorted(each.change for each in found)


@pytest.mark.parametrize(("images", "certain"), [(2, False), (40, True)])
def test_a_class_with_too_few_images_is_not_certain(images: int, certain: bool) -> None:
    labels = [3] * images
    (lost,) = changes_by_class(Predictions([3] * images, labels), Predictions([0] * images, labels), {})
    assert (lost.change, lost.is_certain) == (-1.0, certain)


class Named(TensorDataset):
    """Says its classes as a dataset of torchvision does."""

    classes = ("cat", "dog")


class Indexed(TensorDataset):
    class_to_idx: ClassVar = {"dog": 1, "cat": 0}


class Silent(L.LightningModule):
    """Does nothing with a batch."""

    def validation_step(self, batch: Any) -> None:
        pass


class NamingData(L.LightningDataModule):
    class_names = ("kitten", "puppy")


IMAGES = torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("dataset", "data", "names"),
    [
        (Named(IMAGES), None, {0: "cat", 1: "dog"}),
        (Indexed(IMAGES), None, {0: "cat", 1: "dog"}),
        (Subset(Named(IMAGES), [0]), None, {0: "cat", 1: "dog"}),
        (Named(IMAGES), NamingData(), {0: "kitten", 1: "puppy"}),
        (TensorDataset(IMAGES), None, {}),
    ],
)
def test_names_are_those_of_the_data_module_or_the_dataset(dataset: Any, data: Any, names: dict[int, str]) -> None:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.validate(Silent(), DataLoader(dataset), verbose=False)
    assert names_of_classes(trainer, data) == names


class Losing(lp.ImageClassifier):
    """Right about all images where nothing is pruned; of class 3 about none otherwise."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.labels = batch[1]
        super().validation_step(batch, batch_idx, dataloader_idx)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        labels = self.labels
        if type(self.model.blocks[1]).__name__ != "Block":
            labels = torch.where(labels == 3, 4, labels)
        return logits * 0 + torch.nn.functional.one_hot(labels, 10)


@pytest.mark.usefixtures("clockwork")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_changes_are_written_where_asked_for_without_a_new_validation(
    running: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plot", "save_tokens"):  # pictures take seconds
        monkeypatch.setattr(f"lightning_prune.comparison.comparison_results.{name}", lambda *_, **__: None)
    model = digits_module(Losing)
    images = torch.zeros(60, 1, 56, 56)
    labels = torch.tensor([3] * 20 + [5] * 40)
    data = DataLoader(TensorDataset(images, labels), batch_size=20)
    messages: list[str] = []

    def compared(**options: Any) -> tuple[Any, list[str], str]:
        trainer, _ = running(schedule=50, limit_val_batches=1.0)
        found = lp.compare(
            trainer, model, data, output=tmp_path, clock=TickingClock(), on_message=messages.append, **options
        )
        with (tmp_path / "results.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        return found, [row.get("worst_class_change", "none") for row in rows], (tmp_path / "report.html").read_text()

    found, column, page = compared()
    assert (found.classes, column) == (None, ["none", "none"])
    assert "classes" not in read_results(tmp_path / "results.json")
    assert "lose most" not in page

    messages.clear()
    found, column, page = compared(per_class=True)
    assert not any("Validating" in line for line in messages)
    assert column == ["", "-1.0"]
    assert (found.rows[1].worst_class, found.rows[1].worst_class_change) == ("3", -1.0)
    written = read_results(tmp_path / "results.json")
    assert written["config"]["per_class"] is True
    three, five = written["classes"]["pomt given"]
    assert (three["label"], three["images"], three["change"], three["certain"]) == (3, 20, -1.0, True)
    assert (three["change"], three["low"], three["high"]) == paired_interval(0, 20, 20)
    assert (five["label"], five["images"], five["change"], five["certain"]) == (5, 40, 0.0, False)
    assert "Classes that lose most" in page


@pytest.mark.usefixtures("clockwork")
def test_unusable_switch(running: Callable[..., Any]) -> None:
    trainer, _ = running(schedule=50)
    with pytest.raises(lp.ArgumentError, match="`per_class` must be True or False, got 'yes'"):
        lp.compare(trainer, digits_module(), lp.DigitsData(), per_class="yes")  # type: ignore[arg-type] # wrong on purpose
