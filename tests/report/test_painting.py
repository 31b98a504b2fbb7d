from itertools import product

import numpy as np
import pytest

from lightning_prune.report.token_maps import TINTS, Floats, borders, paint, shared, strokes, to_pixels

GROUPS = np.array([-1, 0, 1, 1, 2, 1])  # two rows of three: dropped, alone, together; together, alone, together


def picture(colour: bool, height: int = 4, width: int = 6) -> Floats:
    pixels = np.random.default_rng(0).random((height, width, 3))
    return pixels if colour else np.repeat(pixels[..., :1], 3, axis=2)


def test_shared_tokens_are_those_of_several_patches_largest_first() -> None:
    assert shared(np.array([5, 5, 3, -1, 3, 3, 7, -1])).tolist() == [3, 5]
    assert shared(np.array([-1, -1, 2])).tolist() == []


@pytest.mark.parametrize("tinted", [True, False])
def test_painted_as_a_loop_over_pixels_would(tinted: bool) -> None:
    before = picture(colour=True)
    painted = paint(before, GROUPS, (2, 3), tinted)
    members = [(y, x) for y, x in product(range(4), range(6)) if GROUPS[(y // 2) * 3 + x // 2] == 1]
    mean = sum(before[y, x] for y, x in members) / len(members)
    for y, x in product(range(4), range(6)):
        group = GROUPS[(y // 2) * 3 + x // 2]
        red, green, blue = before[y, x]
        if group == -1:
            wanted = [0.8 * 0.93 + 0.2 * (0.299 * red + 0.587 * green + 0.114 * blue)] * 3
        elif group == 1:
            wanted = 0.55 * np.array(TINTS[0]) + 0.45 * before[y, x] if tinted else mean
        else:
            wanted = before[y, x]
        assert painted[y, x] == pytest.approx(wanted)


def test_a_picture_that_is_painted_is_left_alone() -> None:
    before = picture(colour=True)
    copy = before.copy()
    paint(before, GROUPS, (2, 3), tinted=False)
    assert (before == copy).all()


def test_groups_of_a_grey_picture_are_told_apart_by_hue() -> None:
    groups = np.repeat(np.arange(12), 2)
    painted = paint(np.full((8, 12, 3), 0.1), groups, (4, 6), tinted=False)
    colours = {tuple(pixel) for pixel in painted.reshape(-1, 3).round(3).tolist()}
    assert len(colours) == 12
    assert painted.min() >= 0
    assert painted.max() <= 1


def test_patches_need_not_divide_the_picture() -> None:
    where = to_pixels(np.arange(6), (2, 3), (5, 7))
    assert where.shape == (5, 7)
    for y, x in product(range(5), range(7)):
        assert where[y, x] == (y * 2 // 5) * 3 + x * 3 // 7


def test_borders_run_where_a_shared_or_dropped_patch_meets_another() -> None:
    edges = {tuple(map(tuple, edge)) for edge in borders(GROUPS, (2, 3), (4, 6)).tolist()}
    assert edges == {
        ((2.0, 0.0), (2.0, 2.0)),  # dropped | alone
        ((4.0, 0.0), (4.0, 2.0)),  # alone | together
        ((2.0, 2.0), (2.0, 4.0)),  # together | alone
        ((4.0, 2.0), (4.0, 4.0)),  # alone | together
        ((0.0, 2.0), (2.0, 2.0)),  # dropped over together
    }  # none between the two that are alone, nor inside a token


def test_one_stroke_a_dropped_patch() -> None:
    assert strokes(GROUPS, (2, 3), (4, 6)).tolist() == [[[0.0, 2.0], [2.0, 0.0]]]
