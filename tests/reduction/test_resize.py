"""Grids to which images can be scaled, and the scaling itself, against float64 loops."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.reduction import Resize, TokenSequence, portable_graph, resampling_matrix, scale_images
from lightning_prune.reduction import smaller_grids as grids
from lightning_prune.reduction.resize import cell_of_patches, grid_of_count, largest_grid, square_grid

SHAPES = [(14, 14), (5, 5), (10, 20), (20, 10), (4, 17), (1, 9), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_grids_by_a_loop(shape: tuple[int, int]) -> None:
    """All pairs whose scales differ by at most one patch of the longer side; of equal products the least distorted."""
    rows, columns = shape
    best: dict[int, tuple[float, int, int]] = {}
    for h, w in product(range(1, rows + 1), range(1, columns + 1)):
        difference = round(abs(h / rows - w / columns), 12)
        if (h, w) != shape and difference <= 1 / max(shape) + 1e-9:
            best[h * w] = min(best.get(h * w, (difference, h, w)), (difference, h, w))
    expected = [((h, w), count) for count, (_, h, w) in sorted(best.items())]
    assert list(grids(*shape).items()) == expected


def test_grids_of_a_vit() -> None:
    found = grids(14, 14)
    assert list(found.values())[-6:] == [121, 132, 144, 156, 169, 182]
    assert all(abs(h - w) <= 1 and h <= w for h, w in found)
    assert grids(20, 10).keys() == {(w, h) for h, w in grids(10, 20)}


def test_a_number_that_is_no_grid_names_the_nearest() -> None:
    assert grid_of_count(14, 14, 144) == (12, 12)
    with pytest.raises(ScheduleError, match=r"52 \(leaves 144 patches\) or 64 \(leaves 132 patches\).*got 56.*140"):
        grid_of_count(14, 14, 140)
    with pytest.raises(ScheduleError, match=r"0 \(leaves 196 patches\) or 14 .*got 3"):
        grid_of_count(14, 14, 193)
    with pytest.raises(ScheduleError, match=r"195 \(leaves 1 patches\); got 200"):
        grid_of_count(14, 14, -4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_grid_of_at_most(shape: tuple[int, int]) -> None:
    counts = [*grids(*shape).values(), math.prod(shape)]
    for patches in range(math.prod(shape) + 1):
        h, w = largest_grid(*shape, patches)
        assert h * w == max((count for count in counts if count <= patches), default=min(counts))


def test_square_grids() -> None:
    assert [square_grid(count) for count in (196, 200, 7, 1)] == [(14, 14), (10, 20), (1, 7), (1, 1)]


@pytest.mark.parametrize(
    ("shape", "smaller"), [((14, 14), (12, 12)), ((5, 7), (4, 5)), ((3, 3), (3, 3)), ((5, 5), (1, 2))]
)
def test_each_patch_goes_to_the_cell_that_covers_its_middle(shape: tuple[int, int], smaller: tuple[int, int]) -> None:
    cells = cell_of_patches(shape, smaller)
    for place, (y, x) in enumerate(product(range(shape[0]), range(shape[1]))):
        row, column = ((at + 0.5) / n * m for at, n, m in zip((y, x), shape, smaller, strict=True))
        assert cells[place] == int(row) * smaller[1] + int(column)
    assert {*cells} == set(range(math.prod(smaller)))  # no cell is empty


@pytest.mark.parametrize(("size", "new"), [(20, 16), (20, 4), (21, 13), (8, 8), (6, 9), (7, 1)])
def test_the_matrix_is_a_triangle_around_each_new_pixel(size: int, new: int) -> None:
    matrix = resampling_matrix(size, new).double()
    scale = size / new
    for i in range(new):
        middle = (i + 0.5) * scale
        weights = [max(0.0, 1 - abs(j + 0.5 - middle) / max(scale, 1.0)) for j in range(size)]
        expected = torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)
        torch.testing.assert_close(matrix[i], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_forms_scale_alike(dtype: torch.dtype) -> None:
    """As torch in float64, natively and as products with matrices; an image does not depend on the others."""
    images = torch.randn(3, 2, 20, 28, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = F.interpolate(images.double(), (16, 20), mode="bilinear", antialias=True, align_corners=False)
    native = scale_images(images, (16, 20))
    with portable_graph():
        portable = scale_images(images, (16, 20))
        given = scale_images(images, (16, 20), (resampling_matrix(20, 16), resampling_matrix(28, 20)))
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for found in (native, portable):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(portable, given)
    assert torch.equal(scale_images(images[:1], (16, 20)), native[:1])


def test_possible_counts() -> None:
    resize = Resize()
    assert resize.possible_counts(197, 1)[-2:] == (170, 183)
    assert resize.max_removed(197, 1) == 195
    assert resize.possible_counts(34, 2, grid=(4, 8))[-1] == 2 + 28
    assert resize.possible_counts(1, 1) == ()
    assert resize.max_removed(1, 1) == 0
    for grid in ((14, 14), (7, 28)):
        removed = [197 - count for count in resize.possible_counts(197, 1, grid)]
        for wanted in range(1, 200):
            near = resize.nearest_removed(wanted, 197, 1, grid)
            assert near in removed
            assert abs(near - wanted) == min(abs(each - wanted) for each in removed)
    assert np.diff(resize.possible_counts(577, 1)).min() > 0


def test_it_reduces_no_tokens() -> None:
    with pytest.raises(ArgumentError, match="resize, got 26 tokens"):
        Resize().reduce(TokenSequence(torch.zeros(1, 26, 8), 1, True), 9)
