import pytest
import torch

from helpers import reference as naive
from lightning_prune.reduction import TopK, topk, topk_scores

from .drawn import PRECISIONS, check_alone_and_together, draw

# Prefix tokens, and whether the first is CLS: registers alone, as some models have, are none.
HEADS = [(0, False), (1, True), (1, False), (2, True), (5, True), (4, False)]


@pytest.mark.parametrize(("prefix", "class_token"), HEADS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_remove_matches_the_reference(prefix: int, class_token: bool, heads: int, batch: int) -> None:
    sequence = draw(batch, 7, prefix, class_token, heads)
    attention = sequence.attention
    assert attention is not None
    scores = topk_scores(attention, prefix, class_token)
    max_removed = TopK().max_removed(prefix + 7, prefix)
    assert max_removed == 6
    for b in range(batch):
        expected = naive.topk_scores(attention.query[b], attention.key[b], prefix, class_token)
        torch.testing.assert_close(scores[b], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        for remove in range(1, max_removed + 1):
            reduced = TopK().reduce(sequence, remove)
            left, positions = naive.keep_best(sequence.tokens[b], expected, remove, prefix)
            assert reduced.positions[b].tolist() == positions
            assert torch.equal(reduced.tokens[b], left)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("class_token", [True, False])
def test_lower_precision_matches_the_reference(dtype: torch.dtype, tolerance: float, class_token: bool) -> None:
    sequence = draw(dtype=dtype)
    assert sequence.attention is not None
    query, key, _ = sequence.attention[:3]
    scores = topk_scores(sequence.attention, 1, class_token)
    assert scores.dtype == torch.float32
    for b in range(3):
        expected = torch.tensor(naive.topk_scores(query[b], key[b], 1, class_token))
        torch.testing.assert_close(scores[b], expected, rtol=tolerance, atol=tolerance)
    reduced = topk(sequence.tokens, sequence.attention, 6, 1, class_token)
    assert reduced.tokens.dtype == dtype
    assert torch.equal(reduced.tokens[0], sequence.tokens[0, reduced.positions[0]])
    assert reduced.sizes is None


def test_only_the_query_of_the_class_token_has_an_effect() -> None:
    """Patch queries have no effect if there is a CLS token, and register queries never have."""
    attention = draw(prefix=5).attention
    assert attention is not None
    query = attention.query.clone()
    query[:, :, 1:] = 100.0
    other = attention._replace(query=query)
    assert torch.equal(topk_scores(other, 5, True), topk_scores(attention, 5, True))
    query = attention.query.clone()
    query[:, :, :5] = 100.0
    other = attention._replace(query=query)
    assert torch.equal(topk_scores(other, 5, False), topk_scores(attention, 5, False))


def test_mask_and_scale_change_the_scores() -> None:
    attention = draw(1).attention
    assert attention is not None
    bias = torch.zeros(12, 12, dtype=torch.float64)
    bias[0, 4] = -1e9
    assert topk_scores(attention._replace(mask=bias), 1, True)[0, 3] == 0
    flat = topk_scores(attention._replace(scale=0.0), 1, True)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 12))


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_alone_and_together(TopK())


@pytest.mark.parametrize(("tokens", "prefix", "max_removed"), [(197, 1, 195), (2, 1, 0), (1, 1, 0), (4, 0, 3)])
def test_max_removed(tokens: int, prefix: int, max_removed: int) -> None:
    assert TopK().max_removed(tokens, prefix) == max_removed


def test_attributes() -> None:
    assert (TopK().name, TopK().site, TopK().reads) == ("topk", "block", {"attention"})
    facts = [TopK().is_lossless, TopK().tracks_sizes, TopK().proportional_attention, TopK().adaptive]
    assert not any(facts)
