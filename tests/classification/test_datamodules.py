import tarfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from timm.data import dataset_factory
from torch import nn

from helpers.models import tiny_vit
from lightning_prune.classification import evaluation_data
from lightning_prune.classification.datamodules import DigitsData, ImageFolderData
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.classification.image_table import ImageTableData
from lightning_prune.errors import ArgumentError, DataError

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}


class TinyModel(nn.Module):
    """A classifier with a `pretrained_cfg`, as timm's models have."""

    def __init__(self, num_classes: int = 2, channels: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(channels, num_classes)
        self.pretrained_cfg = {
            "input_size": (channels, 16, 16),
            "mean": (0.5,) * channels,
            "std": (0.25,) * channels,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean((2, 3)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in each of two classes, in a folder named after the split."""
    for name, colour in (("ant", (255, 0, 0)), ("bee", (0, 0, 255))):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (24, 20), colour).save(tmp_path / "images" / "val" / name / f"{number}.png")
    return tmp_path / "images"


def trainer(**kwargs: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **kwargs)


@pytest.mark.parametrize("damage", ["no image", "cut", "empty"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_and_no_other_takes_its_place(damage: str, workers: int, folder: Path) -> None:
    path = folder / "val" / "ant" / "2.png"
    Image.effect_noise((64, 64), 50).save(path)  # large enough for a cut behind its header
    whole = path.read_bytes()
    path.write_bytes({"no image": b"damaged", "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    data = ImageFolderData(str(folder), batch_size=4, num_workers=workers, data_config=CONFIG)
    data.setup("validate")
    with pytest.raises(DataError, match=r"`root` must hold images that can be read, got .*val/ant/2\.png"):
        list(data.val_dataloader())
    path.write_bytes(whole)
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0, 0, 0, 1, 1, 1]


def test_images_are_those_of_timm(folder: Path) -> None:
    data = ImageFolderData(str(folder), batch_size=4, num_workers=0, data_config=CONFIG)
    data.setup("validate")
    plain = dataset_factory.create_dataset("", str(folder), "val", transform=data.dataset.transform)
    assert len(data.dataset) == len(plain) == 6
    for index in range(6):
        (image, label), (expected, right) = data.dataset[index], plain[index]
        assert torch.equal(image, expected)
        assert label == right


def test_folder_uses_the_data_config(folder: Path) -> None:
    data = ImageFolderData(str(folder), batch_size=4, num_workers=0, data_config=CONFIG)
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [images.shape for images, _ in batches] == [(4, 3, 16, 16), (2, 3, 16, 16)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    red, green, _ = batches[0][0][0].mean((1, 2)).tolist()
    assert (red, green) == pytest.approx((2.0, -2.0))  # (1 - 0.5) / 0.25, (0 - 0.5) / 0.25


def test_folder_takes_the_data_config_from_the_trainer(folder: Path) -> None:
    data = ImageFolderData(str(folder), batch_size=2, num_workers=0)
    module = ImageClassifier(TinyModel())
    run = trainer()
    (logged,) = run.validate(module, data, verbose=False)
    assert 0 <= logged["val/top1"] <= 1
    assert next(iter(data.val_dataloader()))[0].shape == (2, 3, 16, 16)
    (tested,) = run.test(module, data, verbose=False)
    assert tested["test/top1"] == logged["val/top1"]
    predicted = run.predict(module, data)
    assert predicted is not None
    assert [tuple(logits.shape) for logits in predicted] == [(2, 2)] * 3


def test_workers_load_the_same_images(folder: Path) -> None:
    data = ImageFolderData(str(folder), batch_size=6, num_workers=1, data_config=CONFIG)
    alone = ImageFolderData(str(folder), batch_size=6, num_workers=0, data_config=CONFIG)
    for module in (data, alone):
        module.setup("test")
    assert torch.equal(next(iter(data.test_dataloader()))[0], next(iter(alone.test_dataloader()))[0])


def test_tar(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder / "val", arcname=".")
    data = ImageFolderData(str(tmp_path / "images.tar"), batch_size=6, num_workers=0, data_config=CONFIG)
    data.setup("validate")
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_one_channel_model_gets_grey_images(folder: Path) -> None:
    data = ImageFolderData(str(folder), batch_size=6, num_workers=0)
    trainer().validate(ImageClassifier(TinyModel(channels=1)), data, verbose=False)
    assert next(iter(data.val_dataloader()))[0].shape == (6, 1, 16, 16)


def test_class_map_determines_the_labels(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("bee\nant\ncat\n")
    data = ImageFolderData(
        str(folder), batch_size=6, num_workers=0, class_map=str(tmp_path / "classes.txt"), data_config=CONFIG
    )
    data.setup("validate")
    assert sorted(next(iter(data.val_dataloader()))[1].tolist()) == [0, 0, 0, 1, 1, 1]
    trainer().validate(ImageClassifier(TinyModel(num_classes=3)), data, verbose=False)  # as many as in the map


def test_other_classes_than_the_head_are_rejected(folder: Path) -> None:
    data = ImageFolderData(str(folder), num_workers=0)
    with pytest.raises(DataError, match=rf"`root`.*7 classes.*got {folder} with 2\."):
        trainer().validate(ImageClassifier(TinyModel(num_classes=7)), data)


def test_a_folder_without_images_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=rf"`root`.*got {tmp_path}: Found 0 images"):
        ImageFolderData(str(tmp_path), data_config=CONFIG).setup("validate")


def test_an_unknown_split_is_rejected(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"`split` must be one of val in {folder}, got 'test'\.$"):
        ImageFolderData(str(folder), split="test", data_config=CONFIG).setup("validate")
    ImageFolderData(str(folder / "val"), split="test", data_config=CONFIG).setup("validate")  # classes at the top


def test_a_class_may_have_the_name_of_a_split(folder: Path) -> None:
    (folder / "val" / "bee").rename(folder / "val" / "train")
    for root in (folder, folder / "val"):
        data = ImageFolderData(str(root), batch_size=6, num_workers=0, data_config=CONFIG)
        data.setup("validate")
        assert next(iter(data.val_dataloader()))[1].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_leading_tilde_is_the_home_of_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert ImageFolderData(f"~/{folder.name}").root == str(folder)


def test_a_missing_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`root`.*got .*nowhere\.$"):
        ImageFolderData(str(tmp_path / "nowhere"), data_config=CONFIG).setup("validate")


def test_a_missing_data_config_is_rejected(folder: Path) -> None:
    with pytest.raises(DataError, match=r"`data_config`.*LightningModule"):
        ImageFolderData(str(folder)).setup("validate")


def test_folder_for_a_module_of_the_user(folder: Path) -> None:
    """Its normalisation is unknown, and ImageNet's would be a guess."""
    module = ImageClassifier(tiny_vit(img_size=16, num_classes=2, depth=1, num_heads=1))
    with pytest.raises(DataError, match=r"`data_config`.*normalisation"):
        trainer().validate(module, ImageFolderData(str(folder), num_workers=0))
    data = ImageFolderData(str(folder), num_workers=0, data_config=CONFIG)
    assert trainer().validate(module, data, verbose=False)[0]["val/loss"] > 0


def test_digits_have_every_held_out_scan_in_several_placements() -> None:
    data = DigitsData(batch_size=50)
    data.setup("validate")
    assert len(data.val_dataloader()) == len(data.test_dataloader()) == len(data.predict_dataloader()) == 40
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (50, 1, 56, 56)
    assert len(labels.unique()) == 10


def test_digits_train_on_new_placements_every_epoch() -> None:
    seen: list[list[int]] = []

    class Module(L.LightningModule):
        automatic_optimization = False

        def on_train_epoch_start(self) -> None:
            seen.append(list(self.trainer.train_dataloader.sampler))

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            assert batch[0].shape == (32, 1, 56, 56)

        def configure_optimizers(self) -> None:
            return None

    running = trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0, enable_checkpointing=False)
    running.fit(Module(), DigitsData(batch_size=32))
    assert min(seen[1]) == 1297 > max(seen[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TinyModel(num_classes=10), r"`model`.*1 x 56 x 56.*got 3 x 16 x 16\."),
        ("vit_digits_patch4_56", r"`model`.*10 classes.*got 4\."),
    ],
)
def test_a_model_for_other_images_is_rejected(model: nn.Module | str, message: str) -> None:
    classes = None if isinstance(model, nn.Module) else 4
    with pytest.raises(DataError, match=message):
        trainer().validate(ImageClassifier(model, pretrained=False, num_classes=classes), DigitsData())


def test_digits_for_a_module_of_the_user() -> None:
    module = ImageClassifier(tiny_vit(in_chans=1, img_size=56, num_classes=10, depth=1, num_heads=1))
    (logged,) = trainer(limit_val_batches=1).validate(module, DigitsData(), verbose=False)
    assert 0 <= logged["val/top1"] <= 1


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1)])
def test_invalid_arguments_are_rejected(name: str, value: int) -> None:
    for kind in (DigitsData, lambda **kwargs: ImageFolderData("images", **kwargs)):
        with pytest.raises(ArgumentError, match=rf"`{name}`.*got {value}\."):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("cores", "given", "workers"), [(1, None, 1), (2, None, 2), (64, None, 4), (1, 3, 3), (8, 0, 0)]
)
def test_workers_are_no_more_than_cores_unless_they_are_given(
    cores: int, given: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_data, "usable_cores", lambda: cores)
    for data in (ImageFolderData("images", num_workers=given), ImageTableData("images", num_workers=given)):
        assert data.num_workers == workers
        data.dataset = torch.utils.data.TensorDataset(torch.zeros(2))
        loader = data.val_dataloader()
        assert (loader.num_workers, loader.persistent_workers) == (workers, workers > 0)


def test_a_named_dataset_can_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passed: dict[str, Any] = {}

    class Fetched(torch.utils.data.Dataset[Any]):
        classes = ("ant", "bee")

        def __init__(self, **options: Any) -> None:
            passed.update(options)

        def __len__(self) -> int:
            return 1

    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "cifar10", Fetched)
    for download in (True, False):
        data = ImageFolderData(str(tmp_path), dataset="torch/cifar10", download=download, data_config=CONFIG)
        data.setup("validate")
        assert passed["download"] is download
        assert passed["train"] is False


def test_a_folder_cannot_be_downloaded() -> None:
    with pytest.raises(ArgumentError, match=r"`download`.*`dataset`, got True"):
        ImageFolderData("images", download=True)
