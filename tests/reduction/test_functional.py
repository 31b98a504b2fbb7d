from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_prune.reduction import Attention
from lightning_prune.reduction.functional import attention_probabilities, best_in_order, take_tokens, with_prefix

B, H, N, D = 2, 3, 7, 4


def draw() -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, B, H, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return query, key, value


def some_mask(kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(2)
    if kind == "none":
        return None
    if kind == "additive":
        return torch.randn(B, H, N, N, generator=generator, dtype=torch.float64)
    if kind == "additive-keys":
        return torch.randn(B, 1, 1, N, generator=generator, dtype=torch.float64)
    mask = torch.rand(N, N, generator=generator) > 0.4
    mask.fill_diagonal_(True)
    return mask if kind == "bool-all-images" else mask.expand(B, H, N, N)


@pytest.mark.parametrize("kind", ["none", "bool", "bool-all-images", "additive", "additive-keys"])
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
def test_probabilities_with_masks_and_scales(naive: SimpleNamespace, kind: str, scale: float | None) -> None:
    query, key, value = draw()
    mask = some_mask(kind)
    found = attention_probabilities(Attention(query, key, value, mask, scale))
    for b in range(B):
        whole = None if mask is None else mask.expand(B, H, N, N)[b]
        expected = torch.tensor(naive.probabilities(query[b], key[b], scale, whole), dtype=torch.float64)
        torch.testing.assert_close(found[b], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["none", "bool", "bool-all-images", "additive", "additive-keys"])
@pytest.mark.parametrize("queries", [slice(0, 1), slice(2, None), slice(1, 4)])
def test_some_queries_cost_their_rows_only(kind: str, queries: slice) -> None:
    attention = Attention(*draw(), mask=some_mask(kind))
    rows = attention_probabilities(attention, queries)
    torch.testing.assert_close(rows, attention_probabilities(attention)[:, :, queries], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "additive-keys"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_they_are_what_fused_attention_applies(kind: str, scale: float | None) -> None:
    query, key, value = draw()
    mask = some_mask(kind)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    found = attention_probabilities(Attention(query, key, value, mask, scale)) @ value
    torch.testing.assert_close(found, fused, rtol=1e-10, atol=1e-12)


def test_best_in_order_is_ascending_in_position() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert best_in_order(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    assert best_in_order(scores, 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert best_in_order(scores, 0).shape == (2, 0)


def test_take_tokens_and_prefix() -> None:
    tokens = torch.arange(2 * 5 * 3).view(2, 5, 3)
    index = with_prefix(torch.tensor([[1, 2], [0, 1]]), 2)
    assert index.tolist() == [[0, 1, 3, 4], [0, 1, 2, 3]]
    taken = take_tokens(tokens, index)
    assert torch.equal(taken[0], tokens[0, [0, 1, 3, 4]])
    assert torch.equal(taken[1], tokens[1, [0, 1, 2, 3]])
    assert with_prefix(torch.tensor([[1, 2]]), 0).tolist() == [[1, 2]]
