from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_prune.classification.digits import ClutteredDigits, EpochSampler, draw, load_scans
from lightning_prune.errors import ArgumentError


def test_the_split_is_disjoint_and_stratified() -> None:
    train, train_labels = load_scans("train")
    held_out, held_out_labels = load_scans("held_out")
    assert (len(train), len(held_out)) == (1297, 500)
    # The collection has no duplicates, so equal pixels would mean a shared scan.
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in held_out}
    shares = np.bincount(held_out_labels) / np.bincount(np.concatenate([train_labels, held_out_labels]))
    assert shares.min() > 0.27
    assert shares.max() < 0.29


def test_split_does_not_depend_on_the_seed() -> None:
    assert np.array_equal(ClutteredDigits("train", seed=1).scans, ClutteredDigits("train", seed=2).scans)


def test_image_is_a_pure_function_of_seed_and_index() -> None:
    digits, again = ClutteredDigits("held_out"), ClutteredDigits("held_out")
    late = [again[index][0] for index in (700, 3)][1]  # in another order, after another image
    assert torch.equal(digits[3][0], late)
    assert not torch.equal(digits[3][0], ClutteredDigits("held_out", seed=1)[3][0])
    assert digits[3][0].dtype == torch.float32
    assert isinstance(digits[3][1], int)


def test_workers_do_not_change_the_images() -> None:
    digits = ClutteredDigits("held_out")
    alone, shared = (next(iter(DataLoader(digits, 8, num_workers=workers))) for workers in (0, 2))
    assert torch.equal(alone[0], shared[0])
    assert torch.equal(alone[1], shared[1])


def test_every_placement_has_the_same_scan_at_another_place() -> None:
    digits = ClutteredDigits("held_out", placements=4)
    assert len(digits) == 2000
    assert digits[7][1] == digits[507][1] == digits.labels[7]
    assert digits.render(7)[1] != digits.render(507)[1]


def test_digit_lies_in_its_box_inside_the_canvas() -> None:
    digits = ClutteredDigits("train", clutter=0.0)
    for index in range(60):
        canvas, (top, left, side), _ = digits.render(index)
        assert 0 <= top <= 56 - side
        assert 0 <= left <= 56 - side
        rows, columns = np.nonzero(canvas > 0.05)
        slack = 4  # half a pixel of the scan for the interpolation, and the slant
        assert top - slack <= rows.min()
        assert rows.max() <= top + side + slack
        assert left - slack <= columns.min()
        assert columns.max() <= left + side + slack


def test_clutter_is_outside_of_the_digit() -> None:
    outside = []
    for index in range(40):
        canvas, (top, left, side), _ = ClutteredDigits("train").render(index)
        background = np.ones_like(canvas, dtype=bool)
        background[max(0, int(top) - 4) : int(top + side) + 5, max(0, int(left) - 4) : int(left + side) + 5] = False
        outside.append(canvas[background].max())
    assert np.mean(np.array(outside) > 0.25) > 0.9


def test_clutter_uses_the_given_scans() -> None:
    blank = np.zeros((5, 8, 8), np.float32)
    canvas, *_ = draw(blank, 0, np.random.default_rng(0), clutter=1.0)
    assert canvas.max() < 0.45  # gradient and noise alone


def test_images_are_normalised() -> None:
    images = torch.stack([ClutteredDigits("train", clutter=1.0)[index][0] for index in range(200)])
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1
    assert ClutteredDigits("train")[0][0].mean() < ClutteredDigits("train", clutter=1.0)[0][0].mean()


def test_sampler_uses_new_placements_every_epoch_and_resumes() -> None:
    sampler = EpochSampler(scans=10)
    first = list(sampler)
    sampler.set_epoch(3)
    fourth = list(sampler)
    assert sorted(first) == list(range(10))
    assert sorted(fourth) == list(range(30, 40))
    resumed = EpochSampler(scans=10)
    resumed.set_epoch(3)
    assert list(resumed) == fourth
    assert [index - 30 for index in fourth] != first


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "test"}, r"`split` must be 'train' or 'held_out', got 'test'\."),
        ({"split": "train", "placements": 0}, r"`placements`.*got 0\."),
        ({"split": "train", "seed": -1}, r"`seed`.*got -1\."),
        ({"split": "train", "clutter": 2.0}, r"`clutter`.*got 2\.0\."),
    ],
)
def test_invalid_arguments_are_rejected(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ClutteredDigits(**kwargs)


def test_a_negative_index_is_rejected() -> None:
    with pytest.raises(IndexError, match=r"`index`.*got -1\."):
        ClutteredDigits("train")[-1]
