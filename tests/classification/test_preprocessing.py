"""How images are prepared for a model as it is, and what the user reads of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image

from helpers.models import tiny_hugging_face_vit
from lightning_prune.__main__ import main
from lightning_prune.classification.datamodules import ImageFolderData
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.classification.preprocessing import complete_config, data_config_of
from lightning_prune.errors import DataError

GREY = (0.485 + 0.456 + 0.406) / 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("ant", (255, 0, 0)), ("bee", (0, 0, 255))):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (120, 110), colour).save(tmp_path / "images" / "val" / name / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_size_is_that_of_the_model_and_not_of_its_name(dynamic: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(96, 64), depth=1, dynamic_img_size=dynamic)
    config = data_config_of(model)
    assert config is not None
    assert config["input_size"] == (3, 96, 64)
    assert config["mean"] == model.pretrained_cfg["mean"]
    model.set_input_size((48, 48))
    assert ImageClassifier(model).data_config == {**config, "input_size": (3, 48, 48)}


def test_a_model_of_one_channel_gets_grey_images() -> None:
    config = data_config_of(timm.create_model("deit_tiny_patch16_224", in_chans=1, depth=1))
    assert config is not None
    assert (config["input_size"], config["mean"]) == ((1, 224, 224), (pytest.approx(GREY),))


@pytest.mark.parametrize("dynamic", ["false", "true"])
def test_img_size_decides_the_images_of_a_command(
    folder: Path, dynamic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.model=vit_tiny_patch16_224", "--model.pretrained=false", "--model.num_classes=2"]
    words += [f'--model.model_kwargs={{"img_size": 96, "depth": 2, "dynamic_img_size": {dynamic}}}']
    words += ["--data=ImageFolderData", f"--data.root={folder}", "--data.batch_size=2", "--data.num_workers=0"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--prune.schedule=4"]
    assert main(["validate", *words, "--prune.time_limit=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "37 -> 33" in printed
    assert printed.count("Images: 3 x 96 x 96, bicubic, crop 0.9, mean 0.5 0.5 0.5, std 0.5 0.5 0.5") == 1


def test_the_normalisation_of_a_comparison_is_stored(folder: Path, tmp_path: Path) -> None:
    words = ["--model.model=vit_tiny_patch16_224", "--model.pretrained=false", "--model.num_classes=2"]
    words += ['--model.model_kwargs={"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}']
    words += ["--data=ImageFolderData", f"--data.root={folder}", "--data.batch_size=2", "--data.num_workers=0"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--prune.method=tome"]
    words += ["--prune.schedule=2", "--data.data_config={mean: [0.1, 0.2, 0.3], std: [1, 1, 1]}"]
    assert main(["compare", *words, "--prune.time_limit=0.1", f"--output={tmp_path / 'out'}"]) == 0
    images = json.loads((tmp_path / "out" / "results.json").read_text())["config"]["images"]
    assert (images["input_size"], images["mean"], images["std"]) == ([3, 32, 32], [0.1, 0.2, 0.3], [1, 1, 1])


def test_a_part_of_the_config_can_be_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"input_size": (3, 16, 16), "mean": (0.0, 0.0, 0.0), "std": (0.5, 0.5, 0.5)}
    data = ImageFolderData(str(folder), batch_size=4, num_workers=0, data_config=given)
    for _ in range(2):
        data.setup("validate")
    assert capsys.readouterr().out.splitlines() == ["Images: 3 x 16 x 16, mean 0 0 0, std 0.5 0.5 0.5"]
    assert data.preprocessing == data.hparams["data_config"] == given
    assert next(iter(data.val_dataloader()))[0].amax().item() == 2.0


def test_entries_of_the_user_take_precedence() -> None:
    found = {"input_size": (3, 8, 8), "mean": (0.1,) * 3, "std": (0.2,) * 3}
    assert complete_config(found, {"mean": [0.3] * 3}) == ({**found, "mean": [0.3] * 3}, False)
    assert complete_config({"input_size": (1, 8, 8)}, None)[0]["std"] == (0.5,)
    assert complete_config({"input_size": (1, 8, 8)}, None)[1]
    with pytest.raises(DataError, match=r"`data_config`.*got \{'mean': 3\}"):
        complete_config(None, {"mean": 3})


def saved(tmp_path: Path, processor: Any = None) -> ImageClassifier:
    tiny_hugging_face_vit("ViTForImageClassification", num_labels=2, num_hidden_layers=1).save_pretrained(tmp_path)
    if processor is not None:
        processor.save_pretrained(tmp_path)
    return ImageClassifier(f"hf:{tmp_path}")


def test_images_of_hugging_face_are_prepared_as_its_processor_does(tmp_path: Path) -> None:
    options = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **options)
    config = saved(tmp_path / "vit", processor).data_config
    assert config is not None
    assert (config["input_size"], config["crop_mode"], config["crop_pct"]) == ((3, 32, 32), "squash", 1.0)
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert config["interpolation"] == "bilinear"
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    config = saved(tmp_path / "clip", processor).data_config
    assert config is not None
    assert (config["input_size"], config["crop_mode"], config["crop_pct"]) == ((3, 32, 32), "center", 0.8)
    assert config["interpolation"] == "bicubic"
    image = Image.effect_noise((100, 80), 60).convert("RGB")
    from timm.data.transforms_factory import create_transform

    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(create_transform(**config)(image), expected, atol=0.1)


def test_a_model_without_a_processor_is_normalised_with_a_warning(folder: Path, tmp_path: Path) -> None:
    module = saved(tmp_path / "vit")
    assert module.data_config == {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0}
    data = ImageFolderData(str(folder), batch_size=2, num_workers=0, data_config=module.data_config)
    with pytest.warns(UserWarning, match=r"`mean` and `std` in `data_config`"):
        data.setup("validate")
    assert data.preprocessing["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("split", ["valdation", "test"])
def test_a_split_that_is_not_there_is_named(folder: Path, split: str) -> None:
    given = {"input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (0.5,) * 3}
    (folder / "train" / "ant").mkdir(parents=True)
    (folder / "annotations").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "train" / "ant" / "0.png")
    with pytest.raises(DataError, match=rf"`split` must be one of train, val in {folder}, got '{split}'"):
        ImageFolderData(str(folder), split=split, data_config=given).setup("validate")
    with pytest.raises(DataError, match=rf"`split`.*{folder / 'val'}.*got 'valdation'"):
        ImageFolderData(str(folder / "val"), split="valdation", data_config=given).setup("validate")
    with pytest.raises(DataError, match=r"`split`.*torch/cifar10, got 'valdation'"):
        ImageFolderData(str(folder), split="valdation", dataset="torch/cifar10", data_config=given).setup("validate")
