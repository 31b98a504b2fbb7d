"""Images listed in a table, with groups: what is read, what is reported, and what a comparison says."""

import csv
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune import ImageClassifier, ImageTableData
from lightning_prune.callbacks import TokenPruning
from lightning_prune.classification.image_table import ListedImages
from lightning_prune.cli.main import run
from lightning_prune.errors import ArgumentError, DataError

CONFIG = {"input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}
SIZE = 16
# label, place, brightness; the model below says 1 for bright images
ROWS = [(0, 0, 10), (0, 0, 20), (0, 1, 30), (0, 1, 200), (1, 0, 210), (1, 0, 40), (1, 0, 50), (1, 1, 220)]


class Bright(nn.Module):
    """Says class 1 for bright images."""

    num_classes = 2
    data_config = CONFIG

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        light = images.mean((1, 2, 3))
        return torch.stack([0.5 - light, light - 0.5], dim=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table of images in two parts; those of the other part are all wrong."""
    (tmp_path / "images").mkdir()
    lines = []
    for number, (label, place, light) in enumerate([*ROWS, (0, 0, 255), (1, 1, 0)]):
        Image.new("RGB", (20, 18), (light,) * 3).save(tmp_path / "images" / f"{number}.png")
        part = 2 if number < len(ROWS) else 0
        lines.append({"id": number, "file": f"images/{number}.png", "y": label, "place": place, "split": part})
    write(tmp_path / "metadata.csv", lines)
    return tmp_path


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(lines[0]))
        table.writeheader()
        table.writerows(lines)


def data(folder: Path, **changes: Any) -> ImageTableData:
    given = {"image": "file", "label": "y", "group": ["y", "place"], "where": {"split": 2}, "num_workers": 0}
    return ImageTableData(str(folder), **{"batch_size": 3, "data_config": CONFIG, **given, **changes})


def trainer(**kwargs: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **kwargs)


def test_images_labels_and_groups(folder: Path) -> None:
    found = data(folder)
    found.setup("validate")
    items = [found.dataset[i] for i in range(len(ROWS))]
    assert found.group_names == ("y=0,place=0", "y=0,place=1", "y=1,place=0", "y=1,place=1")
    assert [(item["label"], item["group"]) for item in items] == [(y, 2 * y + place) for y, place, _ in ROWS]
    light = [float(item["image"].mean()) for item in items]
    assert light == pytest.approx([light / 255 for _, _, light in ROWS], abs=1e-6)
    assert isinstance(found.dataset, ListedImages)
    assert len(found.dataset) == len(ROWS)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_accuracy_of_groups(folder: Path, stage: str) -> None:
    run_stage = trainer().validate if stage == "val" else trainer().test
    (found,) = run_stage(ImageClassifier(Bright(), warmup=0), data(folder), verbose=False)
    right: dict[str, list[bool]] = {}
    for label, place, light in ROWS:
        right.setdefault(f"y={label},place={place}", []).append((light > 127) == bool(label))
    for name, correct in right.items():
        assert found[f"{stage}/group_{name}"] == pytest.approx(sum(correct) / len(correct))
    assert found[f"{stage}/worst_group"] == pytest.approx(1 / 3)
    assert found[f"{stage}/worst_group_images"] == 3
    assert found[f"{stage}/top1"] == pytest.approx(5 / 8)


def test_without_groups_there_are_pairs(folder: Path) -> None:
    (found,) = trainer().validate(ImageClassifier(Bright()), data(folder, group=None), verbose=False)
    assert found["val/top1"] == pytest.approx(5 / 8)
    assert not [name for name in found if "group" in name]


def test_one_module_with_and_without_groups(folder: Path) -> None:
    module = ImageClassifier(Bright())
    shares = []
    for group in ("place", None, ["y", "place"]):
        (found,) = trainer().validate(module, data(folder, group=group), verbose=False)
        shares.append(found.get("val/worst_group"))
    assert shares == [pytest.approx(3 / 5), None, pytest.approx(1 / 3)]


def test_names_of_classes(folder: Path) -> None:
    lines = [{"image": f"images/{n}.png", "label": name} for n, name in enumerate(("water", "land", "water"))]
    write(folder / "named.csv", lines)
    plain = {"table": "named.csv", "image": "image", "label": "label", "group": None, "where": None}
    for classes, labels in ((None, [1, 0, 1]), (["water", "sea", "land"], [0, 2, 0])):
        found = data(folder, **plain, classes=classes)
        found.setup("validate")
        assert [found.dataset[i][1] for i in range(3)] == labels


@pytest.mark.parametrize(("first", "second"), [("1.0", "0.0"), (" 1", "0"), ("1e0", "0")])
def test_whole_numbers_in_other_forms(folder: Path, first: str, second: str) -> None:
    lines = [{"image": f"images/{n}.png", "label": label} for n, label in enumerate((first, second, first))]
    write(folder / "forms.csv", lines)
    found = data(folder, table="forms.csv", image="image", label="label", group=None, where=None)
    found.setup("validate")
    assert [found.dataset[i][1] for i in range(3)] == [1, 0, 1]


def test_classes_are_those_of_the_whole_table(folder: Path) -> None:
    lines = [
        {"image": f"images/{n}.png", "label": name, "split": part}
        for n, (name, part) in enumerate([("bird", 0), ("cat", 1), ("dog", 1)])
    ]
    write(folder / "named.csv", lines)
    found = data(folder, table="named.csv", image="image", label="label", group=None, where={"split": 1})
    found.setup("validate")
    assert [found.dataset[i][1] for i in range(2)] == [1, 2]


def test_another_loader_of_the_same_trainer(folder: Path) -> None:
    module, runs = ImageClassifier(Bright()), trainer()
    grouped = data(folder)
    runs.validate(module, datamodule=grouped, verbose=False)
    plain = data(folder, group=None)
    plain.setup("validate")
    (found,) = runs.validate(module, dataloaders=plain.val_dataloader(), verbose=False)
    assert not [name for name in found if "group" in name]
    both = [plain.val_dataloader(), grouped.val_dataloader()]
    logged = runs.validate(module, dataloaders=both, verbose=False)
    assert any(each.get("val/worst_group") == pytest.approx(1 / 3) for each in logged)


@pytest.mark.parametrize("keys", [("inputs", "target"), ("pixel_values", "labels"), ("images", "targets")])
def test_names_of_the_parts_of_a_batch(keys: tuple[str, str]) -> None:
    image, label = keys
    loader = DataLoader([{image: torch.full((3, 4, 4), 0.9), label: right} for right in (1, 0)], batch_size=2)
    (found,) = trainer().validate(ImageClassifier(Bright()), loader, verbose=False)
    assert found["val/top1"] == 0.5


def test_predict_ignores_groups(folder: Path) -> None:
    found = trainer().predict(ImageClassifier(Bright()), data(folder))
    assert found is not None
    assert [len(each) for each in found] == [3, 3, 2]


def test_a_comparison_has_the_worst_group(folder: Path, tmp_path: Path) -> None:
    module = ImageClassifier(tiny_vit(img_size=SIZE, patch_size=4, num_classes=2), num_classes=2)
    pruner = TokenPruning(schedule=lp.Schedule([0, 6, 0, 0], method="topk"), time_limit=1, verbose=False)
    options: dict[str, Any] = {"controls": False, "output": tmp_path / "out"}
    found = lp.compare(trainer(callbacks=[pruner]), module, data(folder, batch_size=4), **options)
    dense, pruned = found.rows[0], found.rows[-1]
    (checked,) = trainer().validate(module, data(folder, batch_size=4), verbose=False)
    assert dense.worst_group_accuracy == pytest.approx(checked["val/worst_group"])
    assert checked[f"val/group_{dense.worst_group}"] == dense.worst_group_accuracy
    assert dense.worst_group_change is None
    assert pruned.worst_group_change == pytest.approx(pruned.worst_group_accuracy - dense.worst_group_accuracy)
    assert pruned.worst_group_images in (1, 2, 3)
    assert pruned.top1_low is not None, "images are paired, groups or not"
    with (tmp_path / "out" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[0]["worst_group_accuracy"]) == pytest.approx(dense.worst_group_accuracy)
    page = (tmp_path / "out" / "report.html").read_text()
    assert dense.worst_group in page
    again = lp.compare(trainer(callbacks=[pruner]), module, data(folder, batch_size=4, group=None), **options)
    assert again.rows[0].worst_group_accuracy is None, "results with other groups are not used"
    table = (folder / "metadata.csv").read_text().replace("images/7.png,1,1", "images/7.png,0,1")
    (folder / "metadata.csv").write_text(table)
    changed = lp.compare(trainer(callbacks=[pruner]), module, data(folder, batch_size=4), **options)
    (expected,) = trainer().validate(module, data(folder, batch_size=4), verbose=False)
    assert changed.rows[0].top1 == pytest.approx(expected["val/top1"]) != dense.top1


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "validate --model.model vit_tiny_patch16_224 --model.num_classes 2 --model.pretrained false "
        f"--data ImageTableData --data.root {folder} --data.image file --data.label y --data.group y "
        "--data.batch_size 4 --data.num_workers 0 "
        "--prune.schedule 56 --prune.verbose false --trainer.logger false"
    )
    assert run([*words.split(), "--data.where", "{split: 2}"]) == 0
    assert "val/group_y=1" in capsys.readouterr().out


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "argument", "got"),
        [
            ({"group": 3}, "group", "3"),
            ({"group": []}, "group", r"\[\]"),
            ({"where": "split"}, "where", "'split'"),
            ({"classes": ["a", "a"]}, "classes", "a"),
            ({"image": ""}, "image", "''"),
            ({"batch_size": 0}, "batch_size", "0"),
        ],
    )
    def test_arguments(self, folder: Path, changes: dict[str, Any], argument: str, got: str) -> None:
        with pytest.raises(ArgumentError, match=f"`{argument}`.*{got}"):
            data(folder, **changes)

    @pytest.mark.parametrize(
        ("changes", "argument", "got"),
        [
            ({"table": "none.csv"}, "table", "none.csv"),
            ({"image": "path"}, "image", "'path'"),
            ({"label": "class"}, "label", "'class'"),
            ({"group": ["y", "back"]}, "group", "'back'"),
            ({"where": {"part": 1}}, "where", "'part'"),
            ({"where": {"split": 7}}, "where", "7"),
            ({"classes": ["0"]}, "classes", "'1'"),
            ({"label": "id"}, "label", "'2'"),
            ({"image": "split"}, "image", "2"),
        ],
    )
    def test_tables(self, folder: Path, changes: dict[str, Any], argument: str, got: str) -> None:
        with pytest.raises(DataError, match=f"`{argument}`.*{re.escape(got)}"):
            trainer().validate(ImageClassifier(Bright()), data(folder, **changes), verbose=False)

    @pytest.mark.parametrize(
        ("lines", "got"),
        [
            ([{"file": "images/0.png", "y": -1, "place": 0}], "'-1'"),
            ([{"file": "images/0.png", "y": 0, "place": ""}], "'place': ''"),
            ([{"file": "images/0.png", "y": "a", "place": 0}], "got None"),
        ],
    )
    def test_rows(self, folder: Path, lines: list[dict[str, Any]], got: str) -> None:
        write(folder / "other.csv", lines)
        with pytest.raises(DataError, match=re.escape(got)):
            trainer().validate(ImageClassifier(Bright()), data(folder, table="other.csv", where=None), verbose=False)

    def test_an_encoding(self, folder: Path) -> None:
        (folder / "other.csv").write_bytes("file,y,place\nimages/0.png,é,0\n".encode("cp1252"))
        with pytest.raises(DataError, match=r"`table`.*UTF-8.*other\.csv"):
            trainer().validate(ImageClassifier(Bright()), data(folder, table="other.csv", where=None), verbose=False)

    def test_three_parts_without_groups(self) -> None:
        triple = DataLoader([(torch.zeros(3, 4, 4), 0, 1)])
        with pytest.raises(DataError, match="must be a pair"):
            trainer().validate(ImageClassifier(Bright()), triple, verbose=False)

    def test_a_damaged_image_is_named(self, folder: Path) -> None:
        (folder / "images" / "1.png").write_bytes(b"damaged")
        with pytest.raises(DataError, match=r"1\.png"):
            trainer().validate(ImageClassifier(Bright()), data(folder), verbose=False)
