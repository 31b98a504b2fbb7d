import pytest
import torch

from helpers import reference as naive
from lightning_prune.reduction import RepresentationShift, shift, shift_scores

from .drawn import check_alone_and_together, draw


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_remove_matches_the_reference(prefix: int, batch: int) -> None:
    sequence = draw(batch, 7, prefix)
    assert sequence.entering is not None
    scores = shift_scores(sequence.tokens, sequence.entering, prefix)
    max_removed = RepresentationShift().max_removed(prefix + 7, prefix)
    assert max_removed == 6
    for b in range(batch):
        expected = naive.shift_scores(sequence.tokens[b], sequence.entering[b], prefix)
        torch.testing.assert_close(scores[b], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        for remove in range(1, max_removed + 1):
            reduced = RepresentationShift().reduce(sequence, remove)
            left, positions = naive.keep_best(sequence.tokens[b], expected, remove, prefix)
            assert reduced.positions[b].tolist() == positions
            assert torch.equal(reduced.tokens[b], left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_matches_the_reference(dtype: torch.dtype) -> None:
    """The difference is computed in float32, so that the ranking in low precision matches the formula."""
    sequence = draw(patches=40, dtype=dtype)
    assert sequence.entering is not None
    scores = shift_scores(sequence.tokens, sequence.entering, 1)
    assert scores.dtype == torch.float32
    reduced = shift(sequence.tokens, sequence.entering, 25, 1)
    assert reduced.tokens.dtype == dtype
    for b in range(3):
        expected = naive.shift_scores(sequence.tokens[b], sequence.entering[b], 1)
        torch.testing.assert_close(scores[b], torch.tensor(expected), rtol=1e-6, atol=0)
        left, positions = naive.keep_best(sequence.tokens[b], expected, 25, 1)
        assert reduced.positions[b].tolist() == positions
        assert torch.equal(reduced.tokens[b].double(), left)


def test_attention_is_not_read() -> None:
    sequence = draw()
    reduced = RepresentationShift().reduce(sequence._replace(attention=None), 4)
    assert torch.equal(reduced.positions, RepresentationShift().reduce(sequence, 4).positions)
    assert RepresentationShift().reads == frozenset()


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_alone_and_together(RepresentationShift())


@pytest.mark.parametrize(("tokens", "prefix", "max_removed"), [(197, 1, 195), (2, 1, 0), (1, 1, 0), (4, 0, 3)])
def test_max_removed(tokens: int, prefix: int, max_removed: int) -> None:
    assert RepresentationShift().max_removed(tokens, prefix) == max_removed


def test_attributes() -> None:
    assert (RepresentationShift().name, RepresentationShift().site) == ("shift", "block")
    facts = [
        RepresentationShift().is_lossless,
        RepresentationShift().tracks_sizes,
        RepresentationShift().proportional_attention,
        RepresentationShift().adaptive,
    ]
    assert not any(facts)
