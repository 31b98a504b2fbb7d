"""Dividing images into patches: the origin of each pixel, and counts that form no grid."""

import pytest
import torch

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.reduction.patchify import cut, cut_like, patch_side


@pytest.mark.parametrize(
    ("height", "width", "count", "side"),
    [
        (224, 224, 196, 16),
        (224, 224, 256, 14),
        (160, 320, 200, 16),
        (56, 56, 196, 4),
        (384, 384, 729, 14),  # a border of 6 pixels is left over
        (32, 32, 1, 32),
        (7, 7, 49, 1),
    ],
)
def test_patch_side(height: int, width: int, count: int, side: int) -> None:
    assert patch_side(height, width, count) == side


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(224, 224, 195), (224, 224, 0), (100, 100, 9), (32, 16, 4), (8, 8, 65), (224, 224, -1)],
)
def test_a_count_without_a_grid_is_rejected(height: int, width: int, count: int) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"{count} patch tokens do not form a grid .* of {height} x {width} pixels"
    ):
        patch_side(height, width, count)


def test_cut_orders_patches_by_row_and_channels_first() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = cut(images, 2)
    assert patches.shape == (2, 6, 12)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                expected = [images[b, c, 2 * row + y, 2 * column + x] for c in range(3) for y in (0, 1) for x in (0, 1)]
                assert patches[b, 3 * row + column].tolist() == expected


def test_cut_matches_the_convolution_of_a_model() -> None:
    """A patch embedding is a matrix product with these patches; a border is ignored."""
    images, embed = torch.randn(2, 3, 23, 31), torch.nn.Conv2d(3, 5, 4, stride=4)
    by_hand = cut_like(images, 5 * 7) @ embed.weight.flatten(1).T + embed.bias
    torch.testing.assert_close(by_hand, embed(images).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("pixels", [None, torch.zeros(2, 196, 768)])
def test_inputs_other_than_images_are_rejected(pixels: torch.Tensor | None) -> None:
    with pytest.raises(UnsupportedModelError, match=r"must be images \(B, channels, height, width\)"):
        cut_like(pixels, 196)
