import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.models import DIGITS_MODEL as NAME
from helpers.models import digits_module, tiny_hugging_face_vit, tiny_torchvision_vit
from lightning_prune.callbacks import TokenPruning
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.errors import ArgumentError, FileFormatError, WeightsError
from lightning_prune.runtimes.base import Runtime

TINY = {"depth": 1, "embed_dim": 32, "num_heads": 1}


def tiny(**kwargs: Any) -> ImageClassifier:
    module: ImageClassifier = digits_module(shape=TINY, **kwargs)
    return module


def save_checkpoint(module: ImageClassifier, path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=path.parent)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def test_weights_file_and_checkpoint_give_the_same_model(tmp_path: Path) -> None:
    source = tiny()
    save_file(source.model.state_dict(), tmp_path / "raw.safetensors")
    torch.save(source.model.state_dict(), tmp_path / "raw.pth")
    save_checkpoint(source, tmp_path / "last.ckpt")
    images = torch.randn(2, 1, 56, 56)
    expected = source.eval()(images)
    for name in ("raw.safetensors", "raw.pth", "last.ckpt"):
        module = ImageClassifier(NAME, weights=str(tmp_path / name), model_kwargs=TINY).eval()
        assert torch.equal(module(images), expected)


def test_a_checkpoint_is_self_contained(tmp_path: Path) -> None:
    save_file(tiny().model.state_dict(), tmp_path / "raw.safetensors")
    module = ImageClassifier(NAME, weights=str(tmp_path / "raw.safetensors"), model_kwargs=TINY)
    save_checkpoint(module, tmp_path / "last.ckpt")
    (tmp_path / "raw.safetensors").unlink()
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    images = torch.randn(2, 1, 56, 56)
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert module.hparams["weights"] == str(tmp_path / "raw.safetensors")  # the run still says where it came from


def test_compile_keeps_the_keys_and_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    module = tiny(runtime="torch.compile")
    assert compiled == [module.model]
    assert list(module.state_dict()) == list(tiny().state_dict())


def test_compiled_module_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced, but run by Python: inductor would need a C++ compiler, which a bare machine does not have.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    module, plain = tiny(runtime="torch.compile").eval(), tiny().eval()
    plain.load_state_dict(copy.deepcopy(module).state_dict())
    images = torch.randn(4, 1, 56, 56)
    torch.testing.assert_close(module(images), plain(images))


class OtherRuntime(Runtime):
    """Runs a model, but not in place, as a classifier requires."""

    name = "other"

    def prepare(self, model: nn.Module, example_inputs: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        return model

    def context(self) -> dict[str, Any]:
        return {}

    def install(self, transformer: Any) -> None:
        return None


@pytest.mark.parametrize("runtime", ["torch.complie", OtherRuntime()])
def test_other_runtimes_are_rejected(runtime: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"`runtime`.*got '?{getattr(runtime, 'name', runtime)}|got OtherRuntime"):
        tiny(runtime=runtime)


def test_copies_and_pickles() -> None:
    module = tiny().eval()
    images = torch.randn(2, 1, 56, 56)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(images), module(images))


def test_head_and_data_config() -> None:
    module = tiny(num_classes=3)
    assert module.num_classes == 3
    assert module(torch.randn(2, 1, 56, 56)).shape == (2, 3)
    assert module.data_config is not None
    assert module.data_config["input_size"] == (1, 56, 56)


def test_a_model_without_a_config_has_no_data_config() -> None:
    """timm would assume 3 x 224 x 224 and ImageNet's normalisation."""
    assert ImageClassifier(nn.Linear(3, 2), num_classes=2).data_config is None


def test_an_unknown_name_suggests_similar_ones() -> None:
    with pytest.raises(ArgumentError, match=r"`model`.*got 'deit_smal_patch16_224'\."):
        ImageClassifier("deit_smal_patch16_224")
    with pytest.raises(ArgumentError, match=r"Similar: .*\bdeit_small_patch16_224\b"):
        ImageClassifier("deit_smal_patch16_224")


def test_missing_pretrained_weights_are_rejected() -> None:
    with pytest.raises(WeightsError, match=rf"`model`.*got '{NAME}.nosuchtag': Invalid pretrained tag"):
        ImageClassifier(f"{NAME}.nosuchtag")


def test_mismatched_weights_are_rejected(tmp_path: Path) -> None:
    save_file(tiny(num_classes=4).model.state_dict(), tmp_path / "four.safetensors")
    with pytest.raises(WeightsError, match=r"2 with another shape: head.weight \(model \(10, 32\), file \(4, 32\)\)"):
        ImageClassifier(NAME, weights=str(tmp_path / "four.safetensors"), model_kwargs=TINY)
    with pytest.raises(FileFormatError, match=r"`weights`.*got .*none\.pth"):
        ImageClassifier(NAME, weights=str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 0}, r"`num_classes`.*got 0\."),
        ({"warmup": -1}, r"`warmup`.*got -1\."),
        ({"model": nn.Linear(3, 2)}, r"`num_classes`.*Linear.*got None"),
        ({"model": nn.Linear(3, 2), "model_kwargs": TINY}, r"`model_kwargs`.*module.*got \{'depth': 1"),
        (
            {"model": NAME, "model_kwargs": {"colour": 3}},
            rf"`model_kwargs`.*{NAME}, got \['colour'\]: .*colour",
        ),
    ],
)
def test_invalid_arguments_are_rejected(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ImageClassifier(pretrained=False, **kwargs) if "model" in kwargs else tiny(**kwargs)


def test_works_from_a_config_file(tmp_path: Path) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(ImageClassifier, "model")
    config = {"class_path": "lightning_prune.ImageClassifier"}
    options = {"model": NAME, "pretrained": False, "model_kwargs": TINY, "num_classes": 4}
    parsed = parser.parse_object({"model": {**config, "init_args": options}})
    assert parser.instantiate_classes(parsed).model.num_classes == 4


def test_a_model_of_hugging_face() -> None:
    """Its output has a field `logits`, and it has `num_labels` instead of `num_classes`."""
    module = ImageClassifier(tiny_hugging_face_vit("ViTForImageClassification", num_labels=7))
    assert module.num_classes == 7
    images = torch.randn(8, 3, 32, 32)
    assert torch.equal(module.eval()(images), module.model(images).logits)
    data = DataLoader(TensorDataset(images, torch.arange(8) % 7), batch_size=4)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(callbacks=[TokenPruning("pomt", schedule=6, time_limit=0.01, verbose=False)], **options)
    (found,) = trainer.validate(module, data, verbose=False)
    assert 0 <= found["val/top1"] <= found["val/top5"] <= 1
    assert found["pruning/tokens"] == 11


def test_a_model_of_torchvision() -> None:
    module = ImageClassifier(tiny_torchvision_vit(depth=2, num_classes=6))
    assert module.num_classes == 6
    assert module.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 6)
