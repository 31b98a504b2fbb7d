"""Global random numbers after something that used them."""

import random
from contextlib import suppress
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from helpers.data import noise_images
from lightning_prune._utils.random_state import preserve_random_state

from .tiny import Tiny, pruner, validated


def draw() -> tuple[float, float, float]:
    legacy = np.random.randn()  # noqa: NPY002  # the global generator is what this is about
    return random.random(), legacy, torch.rand(1).item()


@pytest.mark.parametrize("error", [None, ValueError("inside"), KeyboardInterrupt()])
def test_preserve_random_state_restores_all_generators(error: BaseException | None) -> None:
    L.seed_everything(5)
    expected = draw()
    L.seed_everything(5)
    with suppress(ValueError, KeyboardInterrupt), preserve_random_state():
        draw()
        if error is not None:
            raise error
    assert draw() == expected


def test_an_error_while_deciding_restores_all_generators() -> None:
    def unlucky() -> Any:
        yield noise_images(4, seed=1)
        draw()
        raise ValueError("no more images")

    module = Tiny()
    L.seed_everything(5)
    validated(pruner(enabled=False), module)
    expected = draw()
    L.seed_everything(5)
    with pytest.raises(ValueError, match="no more images"):
        validated(pruner(calibration=unlucky()), module)
    assert draw() == expected
