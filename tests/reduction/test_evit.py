import pytest
import torch

from helpers import reference as naive
from lightning_prune.reduction import AttentionInputs, EViT, evit, topk_scores

from .drawn import PRECISIONS, check_alone_and_together, draw


@pytest.mark.parametrize(("prefix", "class_token"), [(0, False), (1, True), (2, True), (5, True), (4, False)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_remove_matches_the_reference(prefix: int, class_token: bool, batch: int) -> None:
    sequence = draw(batch, 7, prefix, class_token)
    attention = sequence.attention
    assert attention is not None
    max_removed = EViT().max_removed(prefix + 7, prefix)
    assert max_removed == 5
    for b in range(batch):
        scores = naive.topk_scores(attention.query[b], attention.key[b], prefix, class_token)
        for remove in range(1, max_removed + 1):
            reduced = EViT().reduce(sequence, remove)
            assert reduced.tokens.shape == (batch, prefix + 7 - remove, 8)
            expected, positions = naive.evit(sequence.tokens[b], scores, remove, prefix)
            assert reduced.positions[b].tolist() == positions
            torch.testing.assert_close(reduced.tokens[b], expected, rtol=1e-12, atol=1e-13)
            assert torch.equal(reduced.tokens[b, :-1], sequence.tokens[b, positions[:-1]]), "kept ones keep their bits"


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("class_token", [True, False])
def test_lower_precision_matches_the_reference(dtype: torch.dtype, tolerance: float, class_token: bool) -> None:
    """The reference uses the tokens that were actually dropped, because bfloat16 may rank near-ties differently."""
    sequence = draw(patches=13, dtype=dtype)
    assert sequence.attention is not None
    reduced = evit(sequence.tokens, sequence.attention, 6, 1, class_token)
    assert reduced.tokens.dtype == dtype
    scores = topk_scores(sequence.attention, 1, class_token).double()
    for b in range(3):
        positions = reduced.positions[b].tolist()
        assert positions[:-1] == sorted(positions[:-1])
        assert positions[-1] == -1
        dropped = [i for i in range(1, 14) if i not in positions]
        assert len(dropped) == 7
        weights = scores[b, [i - 1 for i in dropped]]
        assert weights.max() <= scores[b, [i - 1 for i in positions[1:-1]]].min()
        expected = (weights[:, None] * sequence.tokens[b, dropped].double()).sum(0) / weights.sum()
        torch.testing.assert_close(reduced.tokens[b, -1].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_scores_give_equal_weights(dtype: torch.dtype) -> None:
    """CLS attends to itself and the kept patches only, as with nearly one-hot attention."""
    sequence = draw(2, 6, dtype=dtype)
    attention = sequence.attention
    assert attention is not None
    mask = torch.full((7, 7), float("-inf"), dtype=dtype)
    mask[:, :3] = 0
    reduced = EViT().reduce(sequence._replace(attention=attention._replace(mask=mask)), 3)
    assert reduced.positions.tolist() == [[0, 1, 2, -1]] * 2
    expected = sequence.tokens[:, 3:].double().mean(1)
    torch.testing.assert_close(reduced.tokens[:, -1].double(), expected, rtol=1e-2, atol=1e-2)


def test_autocast_does_not_round_tokens() -> None:
    tokens, attention = draw(dtype=torch.float32).tokens, AttentionInputs(*torch.zeros(3, 3, 2, 12, 4))
    expected = evit(tokens, attention, 4, 1, True).tokens
    with torch.autocast("cpu", torch.bfloat16):
        found = evit(tokens, attention, 4, 1, True).tokens
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_equal_tokens_are_fused_to_that_token() -> None:
    """Equal tokens are fused into the same token, even with little attention."""
    sequence = draw(1, 30)
    x = torch.full_like(sequence.tokens, 3.0)
    reduced = EViT().reduce(sequence._replace(tokens=x), 20)
    torch.testing.assert_close(reduced.tokens, torch.full_like(reduced.tokens, 3.0), rtol=1e-12, atol=0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_alone_and_together(EViT())


@pytest.mark.parametrize(
    ("tokens", "prefix", "max_removed"), [(197, 1, 194), (3, 1, 0), (2, 1, 0), (1, 1, 0), (4, 0, 2)]
)
def test_max_removed(tokens: int, prefix: int, max_removed: int) -> None:
    assert EViT().max_removed(tokens, prefix) == max_removed


def test_attributes() -> None:
    assert (EViT().name, EViT().site, EViT().reads) == ("evit", "block", {"attention"})
    facts = [EViT().is_lossless, EViT().tracks_sizes, EViT().proportional_attention, EViT().adaptive]
    assert not any(facts)
