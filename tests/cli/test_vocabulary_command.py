"""The command `vocabulary`: its images, its output file and its errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.__main__ import main
from lightning_prune.callbacks import TokenPruning
from lightning_prune.classification.digits import MEAN, STD, ClutteredDigits
from lightning_prune.cli.trainer import PruneTrainer
from lightning_prune.errors import ArgumentError, DataError, UnsupportedModelError
from lightning_prune.reduction.vocabulary import Vocabulary

TINY = [
    "--model.model=vit_digits_patch4_56",
    "--model.pretrained=false",
    '--model.model_kwargs={"depth": 4, "embed_dim": 32, "num_heads": 2}',
    "--data=DigitsData",
    "--data.init_args.batch_size=8",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=2",
]
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


TIMM_NAME = "vit_tiny_patch16_224"  # whose config says how images are normalised


class UserModule(L.LightningModule):
    """A user's module that scales images in a hook, and whose steps must not run."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit(TIMM_NAME, seed=None, depth=2, num_classes=1000).train()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, *batch[1:]]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("a step ran")


def images(count: int = 12) -> Tensor:
    return noise_images(count)


def loader(count: int = 12) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images(count), torch.zeros(count)), batch_size=5)


def test_the_command_writes_the_same_words_as_learn_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "words.safetensors"
    assert main(["vocabulary", *TINY, "--words=30", "--limit=20", f"--output={path}"]) == 0
    printed = capsys.readouterr().out
    assert "30 words for patches of 1 x 4 x 4, learned from 20 images" in printed
    assert "threshold 0.1: " in printed
    assert "of 196 patch tokens are left per image" in printed
    assert f"Written: {path}" in printed
    written = Vocabulary.load(path)
    digits = ClutteredDigits("held_out", placements=4)
    seen = torch.stack([digits[index][0] for index in range(20)])
    by_hand = lp.learn_vocabulary([seen], patch_size=4, words=30, mean=(MEAN,), std=(STD,), progress=False)
    assert written == by_hand
    assert (written.patches, written.seed) == (20 * 196, 0)

    words = ["--prune.method=lightning_prune.reduction.VWTInter", f"--prune.method.vocabulary={path}"]
    limits = ["--prune.method.threshold=0.2", "--prune.time_limit=0.5"]
    assert main(["validate", *TINY, *words, *limits]) == 0
    printed = capsys.readouterr().out
    assert "depends on the image (vwt-inter)" in printed
    assert "val/top1" in printed


def test_words_are_learned_from_transformed_images_and_the_module_is_restored(tmp_path: Path) -> None:
    module, pruner = UserModule(), TokenPruning(verbose=False)
    trainer = PruneTrainer(callbacks=[pruner], **OPTIONS)
    callbacks = list(trainer.callbacks)
    path = tmp_path / "words.safetensors"
    learned = trainer.vocabulary(module, loader(), output=str(path), words=9)
    assert learned == Vocabulary.load(path)
    cfg = module.vit.pretrained_cfg
    assert learned == lp.learn_vocabulary(
        [2 * images()], patch_size=8, words=9, mean=cfg["mean"], std=cfg["std"], progress=False
    )
    assert "predict_step" not in vars(module)
    assert pruner.enabled
    assert pruner.decision is None
    assert trainer.callbacks == callbacks


@pytest.mark.parametrize(("limit", "seen"), [(1, 1), (5, 5), (7, 7), (12, 12), (100, 12)])
def test_the_limit_counts_images(limit: int, seen: int, tmp_path: Path) -> None:
    trainer = PruneTrainer(**OPTIONS)
    path = tmp_path / "words.safetensors"
    learned = trainer.vocabulary(UserModule(), loader(), output=str(path), words=4, limit=limit)
    assert learned.patches == 16 * seen


class CountedLoader:
    """A loader without a length that counts the batches that are read from it."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in loader():
            self.read += 1
            yield batch


def test_loaders_are_read_up_to_the_limit_and_one_batch_ahead(tmp_path: Path) -> None:
    loaders = [CountedLoader(), CountedLoader()]
    path = tmp_path / "words.safetensors"
    learned = PruneTrainer(**OPTIONS).vocabulary(UserModule(), loaders, output=str(path), words=4, limit=3)
    assert learned.patches == 16 * 3
    assert loaders[0].read + loaders[1].read <= 2


class OwnLoader(UserModule):
    """A module that has its own prediction loader."""

    def predict_dataloader(self) -> DataLoader[Any]:
        return loader()


def test_loader_of_the_module_is_limited_and_restored(tmp_path: Path) -> None:
    module = OwnLoader()
    learned = PruneTrainer(**OPTIONS).vocabulary(module, output=str(tmp_path / "w.safetensors"), words=4, limit=5)
    assert learned.patches == 16 * 5
    assert not {"predict_step", "predict_dataloader"} & set(vars(module))
    assert sum(len(batch[0]) for batch in module.predict_dataloader()) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "words.pt"}, r"`output` must be a file that ends in \.safetensors, got 'words\.pt'"),
        ({"limit": 0}, "`limit` must be a number of images >= 1, got 0"),
        ({"words": 0}, "`words` must be a number of words >= 1, got 0"),
        ({"words": 1000}, "`words` must be at most the number of patches, 192 of 12 images, got 1000"),
        ({"seed": -3}, r"`seed` must be an integer in \[0, .*\], got -3"),
    ],
)
def test_invalid_arguments_are_rejected(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, trainer = UserModule(), PruneTrainer(**OPTIONS)
    with pytest.raises(ArgumentError, match=message):
        trainer.vocabulary(module, loader(), **options)
    assert not list(tmp_path.iterdir())
    assert "predict_step" not in vars(module)


def test_an_unwritable_output_is_rejected_before_loading(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ArgumentError, match="`output` must be a writable folder"):
        PruneTrainer(**OPTIONS).vocabulary(UserModule(), None, output=str(tmp_path / "file" / "words.safetensors"))


def test_an_empty_loader_is_rejected(tmp_path: Path) -> None:
    trainer = PruneTrainer(limit_predict_batches=0, **OPTIONS)
    with pytest.raises(DataError, match="The prediction loader must yield at least one batch"):
        trainer.vocabulary(UserModule(), loader(), output=str(tmp_path / "words.safetensors"))


def test_a_module_without_a_transformer_is_rejected(tmp_path: Path) -> None:
    module = UserModule()
    module.vit = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError):
        PruneTrainer(**OPTIONS).vocabulary(module, loader(), output=str(tmp_path / "words.safetensors"))


def test_a_missing_vocabulary_explains_how_to_create_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *TINY, "--prune.method=vwt-inter"]) == 2
    printed = capsys.readouterr().err
    assert "`vocabulary` must be a Vocabulary or the path of one for vwt-inter, got None" in printed
    assert "--prune.method.vocabulary words.safetensors" in printed


def test_a_config_for_other_channels_gives_unknown_normalisation(tmp_path: Path) -> None:
    module = UserModule()
    module.vit = tiny_vit(TIMM_NAME, seed=None, in_chans=1, depth=2, num_classes=1000).train()
    data = DataLoader(TensorDataset(images()[:, :1], torch.zeros(12)), batch_size=5)
    learned = PruneTrainer(**OPTIONS).vocabulary(module, data, output=str(tmp_path / "words.safetensors"), words=4)
    assert (learned.channels, learned.mean, learned.std) == (1, None, None)
    known = Vocabulary(learned.centroids, 8, mean=(0.5,), std=(0.2,))  # which the model's config cannot contradict
    with lp.patch(module, lp.reduction.VWTInter(known)), torch.no_grad():
        assert module.vit(images()[:, :1]).shape == (12, 1000)
