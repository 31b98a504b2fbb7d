"""The script that trains the CIFAR-10 example, on noise and for a step of each stage."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prune import ImageClassifier, ImageFolderData
from lightning_prune.classification.demo_models import CIFAR_MODEL

SCRIPT = Path(__file__).parents[2] / "examples" / "train_cifar10.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_cifar10", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirteen images of each of ten classes to train on, one to validate on."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 13), ("val", 1)):
        for name in "abcdefghij":
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_cifar10.py", *options])
    script.main()


@pytest.mark.long
def test_trains_saves_and_goes_on(script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, kept = folder / "out" / "weights.safetensors", folder / "kept"
    options = ["--data", str(folder), "--output", str(weights), "--checkpoints", str(kept), "--teacher-epochs", "1"]
    run(script, monkeypatch, *options, "--stages", "20:1", "28:1")
    about = json.loads(weights.with_suffix(".json").read_text())
    assert about["stages"] == [{"side": 20, "epochs": 1.0}, {"side": 28, "epochs": 1.0}]
    data = ImageFolderData(str(folder), split="val", batch_size=5, num_workers=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(ImageClassifier(CIFAR_MODEL, weights=str(weights)), data, verbose=False)
    # As the script prepares them, up to its bicubic resize of floats where a user's is one of bytes.
    assert found["val/loss"] == pytest.approx(about["held_out_loss"], abs=0.02)

    before, step, steps = weights.read_bytes(), script.Cifar10Training.training_step, []
    monkeypatch.setattr(script.Cifar10Training, "training_step", lambda *args: steps.append(1) or step(*args))
    run(script, monkeypatch, *options, "--stages", "20:1", "28:2")
    assert weights.read_bytes() != before, "the run went on for the epoch that was added"
    assert torch.load(kept / "last.ckpt", weights_only=True)["global_step"] == 6
    assert len(steps) == 2


def test_augmented_images_are_windows_of_mirrored_ones(script: Any) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    seen = set()
    for image, changed in zip(images, script.augmented(images), strict=True):
        padded = torch.nn.functional.pad(image[None], [4] * 4, mode="reflect")[0]
        windows = {
            (flip, top, left): (padded.flip(2) if flip else padded)[:, top : top + 32, left : left + 32]
            for flip in (False, True)
            for top in range(9)
            for left in range(9)
        }
        (place,) = (place for place, window in windows.items() if torch.equal(window, changed))
        seen.add(place)
    assert len(seen) > 25


def test_attention_starts_with_the_products_of_the_paper(script: Any) -> None:
    torch.manual_seed(0)
    from timm.layers import Attention

    attention = Attention(128, num_heads=4)
    with torch.no_grad():
        script.initialise_attention(attention)
    query, key, value = attention.qkv.weight.view(3, 4, 32, 128)
    product = (query[0].T @ key[0]).diagonal().mean().item()
    assert product > 0.2, "a token is most like itself, as far as 32 of 128 directions can say so"
    through = (attention.proj.weight @ value.reshape(128, 128)).diagonal().mean().item()
    assert through == pytest.approx(-0.4, abs=0.02)


def test_committed_weights_fit_the_model_and_are_at_most_12_mib() -> None:
    path = Path(__file__).parents[2] / "examples" / "weights" / f"{CIFAR_MODEL}.safetensors"
    module = ImageClassifier(CIFAR_MODEL, pretrained=False, weights=str(path))  # refuses weights of another model
    assert path.stat().st_size <= 12 * 2**20
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["held_out_top1"] >= 80
    with torch.no_grad():
        logits = module.eval()(torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)))
    assert logits.softmax(1).max() > 0.2  # of ten classes: trained weights have an opinion even of noise
