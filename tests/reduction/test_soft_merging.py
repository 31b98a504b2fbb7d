from typing import Any

import pytest
import torch

from helpers import reference as naive
from lightning_prune.errors import ArgumentError
from lightning_prune.reduction import SoftMerge, merge_into_nearest, soft_merge

from .drawn import PRECISIONS, check_alone_and_together, check_one_graph, draw


@pytest.mark.parametrize(("prefix", "class_token"), [(0, False), (1, True), (5, True), (4, False)])
@pytest.mark.parametrize("temperature", [0.03, 1.0])
@pytest.mark.parametrize("merged", [False, True], ids=["first", "later"])
def test_every_remove_matches_the_reference(prefix: int, class_token: bool, temperature: float, merged: bool) -> None:
    method, sequence = SoftMerge(temperature), draw(2, 7, prefix, class_token, trace=True)
    if merged:
        generator = torch.Generator().manual_seed(3)
        sequence = sequence._replace(sizes=torch.rand(2, prefix + 7, generator=generator).double() + 0.5)
    attention = sequence.attention
    assert attention is not None
    assert method.max_removed(prefix + 7, prefix) == 6
    for remove in range(1, 7):
        found = method.reduce(sequence, remove)
        assert found.sizes is not None
        assert found.sources is not None
        for b in range(2):
            key = attention.key[b]
            scores = naive.topk_scores(attention.query[b], key, prefix, class_token)
            known = None if sequence.sizes is None else sequence.sizes[b].tolist()
            rows, places, sizes, sources = naive.soft_merge(
                sequence.tokens[b], key, scores, remove, prefix, temperature, known
            )
            torch.testing.assert_close(found.tokens[b], rows, rtol=1e-10, atol=1e-12)
            assert found.positions[b].tolist() == places
            assert found.sizes[b].tolist() == pytest.approx(sizes, rel=1e-12)
            assert found.sources[b].tolist() == sources
        assert torch.equal(found.tokens[:, :prefix], sequence.tokens[:, :prefix])


def test_nothing_is_lost() -> None:
    """The sizes sum to the number of patches, and the weighted tokens to the sum of all tokens, over several cuts."""
    sequence = draw(2, 40)
    total = sequence.tokens.sum(dim=1)
    for step in range(4):
        found = SoftMerge().reduce(sequence, 8)
        assert found.sizes is not None
        torch.testing.assert_close(found.sizes.sum(dim=1), torch.full((2,), 41.0).double())
        torch.testing.assert_close((found.tokens * found.sizes.unsqueeze(2)).sum(dim=1), total)
        again = draw(2, 40 - 8 * (step + 1), seed=step)
        sequence = again._replace(tokens=found.tokens, sizes=found.sizes)


def test_cold_it_is_merging_into_the_nearest() -> None:
    sequence = draw(2, 20, trace=True)
    attention, scores = sequence.attention, torch.rand(2, 20, generator=torch.Generator().manual_seed(1)).double()
    assert attention is not None
    cold = soft_merge(sequence.tokens, attention.key, scores, 12, 1, temperature=1e-5, trace=True)
    nearest = merge_into_nearest(sequence.tokens, attention.key, scores, 12, 1, trace=True)
    for one, other in zip(cold, nearest, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_lower_precision_matches_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    sequence = draw(patches=30, dtype=dtype)
    assert sequence.attention is not None
    scores = torch.rand(3, 30, generator=torch.Generator().manual_seed(1))
    found = soft_merge(sequence.tokens, sequence.attention.key, scores, 20, 1, temperature=0.1)
    assert found.tokens.dtype == dtype
    assert found.sizes is not None
    assert found.sizes.dtype == torch.float32
    for b in range(3):
        key = sequence.attention.key[b]
        rows, _, sizes, _ = naive.soft_merge(sequence.tokens[b], key, scores[b].tolist(), 20, 1, 0.1)
        torch.testing.assert_close(found.tokens[b].double(), rows, rtol=tolerance, atol=tolerance)
        assert found.sizes[b].tolist() == pytest.approx(sizes, rel=1e-4)


def test_autocast_changes_nothing() -> None:
    sequence = draw(2, 30, dtype=torch.float32)
    expected = SoftMerge().reduce(sequence, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = SoftMerge().reduce(sequence, 12)
    assert found.tokens.dtype == torch.float32
    torch.testing.assert_close(found.positions, expected.positions)


def test_gradients_reach_all_tokens() -> None:
    sequence = draw(1, 7)
    tokens = sequence.tokens.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SoftMerge().reduce(sequence._replace(tokens=x), 3).tokens, tokens)


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_alone_and_together(SoftMerge())


@pytest.mark.long
def test_compiles_and_exports_as_one_graph() -> None:
    check_one_graph(SoftMerge())


def test_attributes() -> None:
    method = SoftMerge()
    assert (method.name, method.reads, method.multi_block) == ("soft-merge", {"attention"}, False)
    assert (method.is_lossless, method.tracks_sizes, method.proportional_attention) == (True, True, True)
    assert method != SoftMerge(0.5)
    assert SoftMerge(0.5, False).settings() == {"temperature": 0.5, "proportional_attention": False}


@pytest.mark.parametrize("given", [{"temperature": 0}, {"temperature": "warm"}, {"proportional_attention": 1}])
def test_invalid_arguments_are_rejected(given: Any) -> None:
    (name,) = given
    with pytest.raises(ArgumentError, match=f"`{name}` must be .*, got "):
        SoftMerge(**given)
