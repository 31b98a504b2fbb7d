"""Images in 8 bits, normalised inside of the exported model."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune.exporting.image_input import ImageInput, input_of

CONFIG = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TAKEN = input_of("uint8", CONFIG, 3)
LEVELS = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def normalised(levels: Tensor) -> Tensor:
    mean, std = (torch.tensor(CONFIG[name])[:, None, None] for name in ("mean", "std"))
    return (levels / 255 - mean) / std


def test_levels_are_found_again_after_they_were_normalised() -> None:
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, -1)
    found, rounding = TAKEN.levels("images", normalised(every))
    assert torch.equal(found, every)
    assert rounding < 1e-3
    torch.testing.assert_close(TAKEN.decoded(every), normalised(every))
    module = TAKEN.module()
    assert module is not None
    torch.testing.assert_close(module(every), normalised(every), rtol=1e-5, atol=1e-6)
    assert torch.equal(TAKEN.encoded(TAKEN.decoded(LEVELS)), LEVELS)
    assert TAKEN.levels("images", LEVELS) == (LEVELS, 0.0)


def test_what_is_between_two_levels_is_rounded() -> None:
    between = normalised(LEVELS[:, :, :1].clamp(max=254) + 0.4)
    found, rounding = TAKEN.levels("images", between)
    assert torch.equal(found, LEVELS[:, :, :1].clamp(max=254))
    assert rounding == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("levels", [-1.0, 256.0, float("nan")])
def test_other_means_are_noticed_where_images_leave_the_range(levels: float) -> None:
    with pytest.raises(lp.ArgumentError, match=r"`images` must be images of 0 to 255, normalised with mean \(0.485, "):
        TAKEN.levels("images", normalised(torch.full((1, 3, 2, 2), levels)))


def test_normalised_images_stay_as_they_are() -> None:
    taken = input_of("float32", {}, 3)
    assert taken == ImageInput()
    assert taken.module() is None
    images = normalised(LEVELS)
    assert taken.encoded(images) is images
    assert ImageInput.from_dict(TAKEN.to_dict()) == TAKEN


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"mean": (0.5,)},
        {"mean": (0.5,) * 3, "std": (0.5, 0.5)},
        {"mean": (0.5,), "std": (0.0,)},
        {"mean": 0.5, "std": 0.5},
    ],
)
def test_a_normalisation_that_is_not_known(config: dict[str, Any]) -> None:
    with pytest.raises(lp.ArgumentError, match=r"`preprocessing` must be a mapping with `(mean|std)`, 1 or 3 numbers"):
        input_of("uint8", config, 3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_vit(depth=1, embed_dim=24, noise=0.3, kind="vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "out"
    options: dict[str, Any] = {"format": "torch-export", "rounds": 0, "preprocessing": CONFIG}
    plan = lp.Schedule([4], "tome")
    lp.export(model, folder, LEVELS[:2], calibration=LEVELS, inputs="uint8", plan=plan, **options)
    return folder


class TestExport:
    def test_the_file_takes_uint8_images(self, folder: Path, model: Any) -> None:
        program = torch.export.load(folder / "model.pt2")
        with torch.no_grad(), lp.patch(model, "tome", [4]):
            expected = model(normalised(LEVELS[:2]))
        torch.testing.assert_close(program.module()(LEVELS[:2]), expected, rtol=1e-4, atol=1e-4)
        sample = np.load(folder / "sample.npz")
        assert np.array_equal(sample["images"], LEVELS[:2].numpy())
        np.testing.assert_allclose(sample["expected"], expected.numpy(), rtol=1e-4, atol=1e-4)
        found = json.loads((folder / "preprocessing.json").read_text())
        assert (found["dtype"], found["range"], found["normalised_inside"]) == ("uint8", [0, 255], True)
        assert found["mean"] == list(CONFIG["mean"])

    def test_normalised_images_run_as_what_they_were(self, folder: Path, model: Any) -> None:
        exported = lp.load_exported(folder)
        assert exported.report.inputs == TAKEN
        with torch.no_grad(), lp.patch(model, "tome", [4]):
            expected = model(normalised(LEVELS))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for images in (LEVELS, normalised(LEVELS)):
                torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-4)
        with pytest.warns(UserWarning, match=r"rounded by up to 0\.30 of 255 levels"):
            exported(normalised(LEVELS.clamp(max=254) + 0.3))
        with pytest.raises(lp.ArgumentError, match="`images` must be images of 0 to 255"):
            exported(5 * normalised(LEVELS))

    def test_float_files_take_no_uint8_images(self, model: Any, tmp_path: Path) -> None:
        images = normalised(LEVELS[:2])
        lp.export(model, tmp_path / "out", images, format="torch-export", rounds=0)
        with pytest.raises(lp.ArgumentError, match="`images` must be normalised images in floating point"):
            lp.load_exported(tmp_path / "out")(LEVELS[:2])

    def test_an_unknown_normalisation_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(lp.ArgumentError, match="`preprocessing` must be a mapping with `mean`"):
            lp.export(tiny_vit(depth=1), tmp_path / "out", LEVELS[:2], inputs="uint8", format="torch-export", rounds=0)
        assert list(tmp_path.iterdir()) == []
