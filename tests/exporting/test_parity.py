"""Parity of an exported model: errors, token flips and the gate, for outputs that are known."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_prune as lp
from lightning_prune.exporting.parity import Parity, check_parity, compare_outputs, in_batches
from lightning_prune.runtimes.converted import relative_errors

IMAGES = torch.rand(400, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.5


def model(images: Tensor) -> Tensor:
    """Two classes: the mean of an image, and 1."""
    mean = images.mean((1, 2, 3))
    return torch.stack([mean, torch.ones_like(mean)], 1)


def off_by(error: float, count: int, total: int = len(IMAGES)):
    """The model with a relative error in the first images."""
    wrong = {float(image[0, 0, 0]) for image in IMAGES[:count]}

    def run(images: Tensor) -> Tensor:
        factors = [1 + error * (float(image[0, 0, 0]) in wrong) for image in images]
        return model(images) * torch.tensor(factors)[:, None]

    return run


def at_tie(images: Tensor) -> Tensor:
    """A model that keeps either the first or the second pixel, whichever is larger; of equal ones the first."""
    first, second = images[:, 0, 0, 0], images[:, 0, 0, 1]
    return torch.stack([torch.where(first >= second, 1.0, 2.0), torch.ones_like(first)], 1)


def parity(**changes: Any) -> Parity:
    usual: dict[str, Any] = {
        "images": 400,
        "max_relative_error": 1e-6,
        "typical_relative_error": 1e-7,
        "tolerance": 1e-3,
        "over_tolerance": 0,
        "token_flips": 0,
        "top1_agreement": 1.0,
    }
    return Parity(**{**usual, **changes})


def lower(**changes: object) -> Parity:
    """In a lower precision than float32."""
    return parity(**{"token_flips": None, "min_agreement": 0.995, **changes})


def test_relative_error_is_that_of_the_largest_output_of_each_image() -> None:
    expected, found = torch.tensor([[10.0, -20.0], [1.0, 0.5]]), torch.tensor([[11.0, -20.0], [1.0, 0.25]])
    assert relative_errors(expected, found).tolist() == pytest.approx([0.05, 0.25])


def test_batches_have_the_size_of_the_model() -> None:
    seen = []

    def run(images: Tensor) -> Tensor:
        seen.append(len(images))
        return model(images)

    assert torch.equal(in_batches(run, IMAGES[:7], 3), model(IMAGES[:7]))
    assert seen == [3, 3, 3]


def test_figures() -> None:
    found = compare_outputs(model, off_by(0.5, 2), IMAGES, 8, 1e-3, classes=True)
    assert (found.images, found.over_tolerance, found.token_flips) == (400, 2, 0)
    assert found.max_relative_error == pytest.approx(0.5)
    assert found.typical_relative_error == 0
    assert found.top1_agreement == 1.0
    assert compare_outputs(model, model, IMAGES, 8, 1e-3, classes=False).top1_agreement is None


def test_an_image_between_two_tokens_is_a_token_flip() -> None:
    images = IMAGES.clone()
    images[3, 0, 0, 0] = images[3, 0, 0, 1]

    def exported(batch: Tensor) -> Tensor:
        other = at_tie(batch)
        equal = batch[:, 0, 0, 0] == batch[:, 0, 0, 1]
        other[equal, 0] = 3 - other[equal, 0]
        return other

    found = compare_outputs(at_tie, exported, images, 8, 1e-3, classes=True)
    assert (found.over_tolerance, found.token_flips) == (1, 1)
    check_parity(found)


class TestGate:
    @pytest.mark.parametrize(
        ("over", "flips", "accepted"), [(0, 0, True), (2, 2, True), (2, 1, False), (3, 3, False), (400, 0, False)]
    )
    def test_float32(self, over: int, flips: int, accepted: bool) -> None:
        found = parity(over_tolerance=over, token_flips=flips)
        if accepted:
            check_parity(found)
            return
        with pytest.raises(lp.ExportError, match=f"{over} of 400 images .*{flips} of them by token flips"):
            check_parity(found)

    def test_float16_is_judged_by_classes(self) -> None:
        check_parity(lower(top1_agreement=0.995, over_tolerance=300))
        with pytest.raises(lp.ExportError, match=r"99\.25% of 400 images the same class.* 300 of 400"):
            check_parity(lower(top1_agreement=0.9925, over_tolerance=300))

    def test_float16_without_classes_is_judged_by_its_error(self) -> None:
        check_parity(lower(top1_agreement=None, over_tolerance=2))
        with pytest.raises(lp.ExportError, match="3 of 400"):
            check_parity(lower(top1_agreement=None, over_tolerance=3))


def test_outputs_that_cannot_be_compared() -> None:
    nan = torch.full((8, 2), float("nan"))
    with pytest.raises(lp.DataError, match="finite"):
        compare_outputs(lambda images: nan, model, IMAGES[:8], 8, 1e-3, True)
    with pytest.raises(lp.ExportError, match="NaN"):
        compare_outputs(model, lambda images: nan, IMAGES[:8], 8, 1e-3, True)
    with pytest.raises(lp.ExportError, match=r"\(8, 1\) where the model returns \(8, 2\)"):
        compare_outputs(model, lambda images: model(images)[:, :1], IMAGES[:8], 8, 1e-3, True)
