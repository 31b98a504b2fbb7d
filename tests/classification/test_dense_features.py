"""The grids of a model as a module of their own."""

from typing import Any

import pytest
import torch
from torch import nn

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune import ImageClassifier
from lightning_prune.classification import DenseFeatures
from lightning_prune.classification.preprocessing import data_config_of
from lightning_prune.errors import ArgumentError, UnsupportedModelError


@torch.no_grad()
def test_the_grids_are_those_of_timm() -> None:
    model, images = tiny_vit(), noise_images(2)
    features = DenseFeatures(model, taps=[1, -1], norm=True).eval()
    expected = model.forward_intermediates(images, indices=[1, 3], norm=True, intermediates_only=True)
    assert features.taps == [1, 3]
    for one, other in zip(features(images), expected, strict=True):
        assert torch.equal(one, other)
    assert DenseFeatures(model).taps == [0, 1, 2, 3]
    assert DenseFeatures("vit_digits_patch4_56").taps == [2, 5, 8, 11]


@torch.no_grad()
def test_in_a_classifier_there_is_no_accuracy() -> None:
    module = ImageClassifier(DenseFeatures(tiny_vit(), taps=[3])).eval()
    assert module.num_classes is None
    assert [tuple(grid.shape) for grid in module(noise_images(2))] == [(2, 32, 4, 4)]
    with lp.patch(module, "tome", [0, 4, 0, 0], restore="auto"):
        assert [tuple(grid.shape) for grid in module(noise_images(2))] == [(2, 32, 4, 4)]


def test_images_are_those_of_the_backbone() -> None:
    model = DenseFeatures("vit_tiny_patch16_224", pretrained=False, model_kwargs={"img_size": 64, "depth": 4})
    found = data_config_of(model)
    assert found is not None
    assert found["input_size"] == (3, 64, 64)
    assert found == data_config_of(model.backbone)


@pytest.mark.parametrize("taps", [[], [4], [-5], [True], "last", [0.5]])
def test_taps_must_be_blocks(taps: Any) -> None:
    with pytest.raises(ArgumentError, match="taps"):
        DenseFeatures(tiny_vit(), taps=taps)


def test_the_model_must_have_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear"):
        DenseFeatures(nn.Linear(2, 2))
