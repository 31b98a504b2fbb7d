"""Counting the tokens that are left per image, without a model."""

import pytest
import torch

import lightning_prune as lp
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.reduction import TokenSequence, VWTInter, tokens_per_image


def test_counts_match_the_method() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(20, 3, 1, 1, generator=generator)
    images = flat + torch.linspace(0.05, 1, 20).view(-1, 1, 1, 1) * torch.randn(20, 3, 16, 24, generator=generator)
    words = lp.learn_vocabulary([images], patch_size=4, words=15, progress=False)
    lengths = []
    for image in images:
        sequence = TokenSequence(torch.zeros(1, 24, 2), 0, False, pixels=image.unsqueeze(0))
        lengths.append(VWTInter(words, 0.2).reduce(sequence, 0).tokens.shape[1])
    assert len(set(lengths)) > 3
    found = tokens_per_image(images.split(6), words, 0.2)
    assert (found.images, found.patches) == (20, 24)
    assert found.mean == pytest.approx(sum(lengths) / 20)
    ordered = sorted(lengths)
    assert found.low == pytest.approx(ordered[0] + 0.95 * (ordered[1] - ordered[0]))
    assert found.high == pytest.approx(ordered[18] + 0.05 * (ordered[19] - ordered[18]))
    assert str(found).startswith(f"{found.mean:.1f} of 24 patch tokens are left per image")


def test_invalid_inputs_are_rejected() -> None:
    words = lp.learn_vocabulary([torch.rand(2, 3, 16, 16)], patch_size=4, words=3, progress=False)
    with pytest.raises(DataError, match="`batches` must hold at least one image, got none"):
        tokens_per_image([], words)
    with pytest.raises(ArgumentError, match=r"patches of 1 x 4 x 4 .* got one for 3 x 4 x 4"):
        tokens_per_image([torch.rand(2, 1, 16, 16)], words)
