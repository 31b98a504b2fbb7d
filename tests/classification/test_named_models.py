"""Models by name: of timm, of Hugging Face, and by import path, from Python and from the command line."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from helpers.data import labelled, noise_images
from helpers.models import disturb, tiny_hugging_face_vit
from lightning_prune import DigitsData
from lightning_prune.__main__ import main
from lightning_prune.callbacks import TokenPruning
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.errors import ArgumentError, WeightsError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OWN = """
import timm
from torch import nn

class Net(nn.Module):
    num_classes = 10

    def __init__(self, width: int = 32):
        super().__init__()
        size = {"img_size": 56, "in_chans": 1, "patch_size": 8, "depth": 2, "num_heads": 2, "num_classes": 10}
        self.net = timm.create_model("vit_tiny_patch16_224", embed_dim=width, **size)

    def forward(self, images):
        return self.net(images)

def number() -> int:
    return 3
"""
DIGITS = [
    "--data=DigitsData",
    "--data.batch_size=4",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--prune.schedule=4",
    "--prune.time_limit=0.1",
]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working folder, which is not on the path."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    return name


@pytest.fixture
def classifier(tmp_path: Path) -> Any:
    """A classifier of digits, saved to `tmp_path / "vit"`."""
    options = {"num_labels": 10, "num_hidden_layers": 2, "image_size": 56, "num_channels": 1}
    source = disturb(tiny_hugging_face_vit("ViTForImageClassification", **options))
    source.save_pretrained(tmp_path / "vit")
    return source


@pytest.fixture
def tower(tmp_path: Path) -> Any:
    source = disturb(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)))
    source.save_pretrained(tmp_path / "clip")
    return source


def test_a_classifier_in_a_folder_of_hugging_face(tmp_path: Path, classifier: Any) -> None:
    module = ImageClassifier(f"hf:{tmp_path / 'vit'}").eval()
    images = noise_images(2, 1, 56)
    assert module.num_classes == 10
    assert torch.equal(module(images), classifier(images).logits)
    random = ImageClassifier(f"hf:{tmp_path / 'vit'}", pretrained=False).eval()
    assert not torch.equal(random(images), module(images))
    loaded = ImageClassifier(f"hf:{tmp_path / 'vit'}", weights=str(tmp_path / "vit")).eval()
    assert torch.equal(loaded(images), module(images))
    other = ImageClassifier(f"hf:{tmp_path / 'vit'}", num_classes=4).eval()
    assert other(images).shape == (2, 4)


def test_a_tower_is_timed_but_has_no_accuracy(tmp_path: Path, tower: Any) -> None:
    module = ImageClassifier(f"hf:{tmp_path / 'clip'}").eval()
    images = noise_images(2)
    assert module.num_classes is None
    assert torch.equal(module(images), tower(images).pooler_output)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(callbacks=[TokenPruning("pomt", schedule=6, time_limit=0.01, verbose=False)], **options)
    (found,) = trainer.validate(module, DataLoader(labelled(8), batch_size=4), verbose=False)
    assert found["pruning/tokens"] == 11
    assert found["val/throughput"] > 0
    assert not {"val/top1", "val/top5", "val/loss"} & set(found)
    with pytest.raises(ArgumentError, match=r"`num_classes`.*CLIPVisionModel.*got 3"):
        ImageClassifier(f"hf:{tmp_path / 'clip'}", num_classes=3)


def test_the_tower_of_a_model_of_images_and_text(tmp_path: Path) -> None:
    text = {**SMALL, "vocab_size": 50}
    config = transformers.CLIPConfig(vision_config={**SMALL, "image_size": 32, "patch_size": 8}, text_config=text)
    source = disturb(transformers.CLIPModel(config))
    source.save_pretrained(tmp_path)
    module = ImageClassifier(f"hf:{tmp_path}").eval()
    assert type(module.model).__name__ == "CLIPVisionModel"
    images = noise_images(2)
    expected = source.vision_model(images).pooler_output
    assert torch.allclose(module(images), expected, atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        lambda folder: {
            "model": "transformers.CLIPVisionModel.from_pretrained",
            "model_kwargs": {"pretrained_model_name_or_path": folder},
        },
        lambda folder: {
            "model": {
                "class_path": "transformers.CLIPVisionModel.from_pretrained",
                "init_args": {"pretrained_model_name_or_path": folder},
            }
        },
        lambda folder: {"model": "transformers.CLIPVisionModel", "weights": folder},
    ],
)
def test_class_paths_with_from_pretrained(tmp_path: Path, tower: Any, form: Any) -> None:
    module = ImageClassifier(**form(str(tmp_path / "clip"))).eval()
    images = noise_images(2)
    assert torch.equal(module(images), tower(images).pooler_output)


@pytest.mark.long
@pytest.mark.parametrize(
    "form",
    [
        ["--model.model=hf:vit"],
        [
            "--model.model=transformers.ViTForImageClassification.from_pretrained",
            "--model.model.pretrained_model_name_or_path=vit",
        ],
    ],
)
def test_hugging_face_from_the_command_line(
    tmp_path: Path,
    classifier: Any,
    form: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["validate", *form, *DIGITS]) == 0
    printed = capsys.readouterr()
    assert "val/top1" in printed.out
    assert "197 -> 193" not in printed.out
    assert "50 -> 46" in printed.out
    assert "Loading weights" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("more", "width"),
    [
        ([], 32),
        pytest.param(["--model.model.width=64"], 64, marks=pytest.mark.long),
    ],
)
def test_a_module_in_the_working_folder(
    own: str, more: list[str], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[nn.Module] = []
    setup = DigitsData.setup

    def spy(self: DigitsData, stage: str) -> None:
        assert self.trainer is not None
        seen.append(self.trainer.lightning_module.model)
        setup(self, stage)

    monkeypatch.setattr(DigitsData, "setup", spy)
    assert main(["validate", f"--model.model={own}.Net", *more, *DIGITS]) == 0
    assert seen[0].net.embed_dim == width
    assert "val/top1" in capsys.readouterr().out


def test_mistakes_about_a_module_of_ones_own(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*words: str) -> str:
        assert main(["validate", *words, *DIGITS]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    assert f"'{own}.Nett'" in fails(f"--model.model={own}.Nett")
    assert "'widht'" in fails(f"--model.model={own}.Net", "--model.model.widht=3")
    assert "'widht'" in fails(f"--model.model={own}.Net", '--model.model_kwargs={"widht": 3}')
    assert f"'{own}.number' of type int" in fails(f"--model.model={own}.number")


def test_a_name_with_a_slash_is_not_compared_with_names_of_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArgumentError, match=r"`model`.*got 'google/vit-base-patch16-224'") as error:
        ImageClassifier("google/vit-base-patch16-224")
    assert "hf:google/vit-base-patch16-224" in str(error.value)
    assert "Similar" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_base").mkdir()
    with pytest.raises(ArgumentError, match=r"`model`.*got 'vit_base'.*hf:vit_base"):
        ImageClassifier("vit_base")


def test_files_that_lack_keys_are_rejected(tmp_path: Path, classifier: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "vit" / "model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if "classifier" not in key}, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"`model`.*ViTForImageClassification.*2 missing: classifier\.bias"):
        ImageClassifier(f"hf:{tmp_path / 'vit'}")
    with pytest.raises(WeightsError, match=r"`model`.*got 'hf:.*nowhere'"):
        ImageClassifier(f"hf:{tmp_path / 'nowhere'}")
