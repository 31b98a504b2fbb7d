import pytest
import torch
from torch import Tensor

from helpers import reference as naive
from lightning_prune.reduction import AttentionInputs, Reduction, ReductionOutput, TokenSequence, resolve
from lightning_prune.reduction.functional import (
    attention_probabilities,
    best_in_order,
    keep_best,
    sources_of,
    take_tokens,
    with_prefix,
)

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
def test_probabilities_match_the_reference_with_mask_and_scale(kind: str, scale: float | None) -> None:
    query, key, value = draw()
    mask = some_mask(kind)
    found = attention_probabilities(AttentionInputs(query, key, value, mask, scale))
    for b in range(B):
        whole = None if mask is None else mask.expand(B, H, N, N)[b]
        expected = torch.tensor(naive.probabilities(query[b], key[b], scale, whole), dtype=torch.float64)
        torch.testing.assert_close(found[b], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["none", "bool", "bool-all-images", "additive", "additive-keys"])
@pytest.mark.parametrize("queries", [slice(0, 1), slice(2, None), slice(1, 4)])
def test_selected_queries_give_their_rows(kind: str, queries: slice) -> None:
    attention = AttentionInputs(*draw(), mask=some_mask(kind))
    rows = attention_probabilities(attention, queries)
    torch.testing.assert_close(rows, attention_probabilities(attention)[:, :, queries], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "additive-keys"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_probabilities_times_values_match_fused_attention(kind: str, scale: float | None) -> None:
    query, key, value = draw()
    mask = some_mask(kind)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    found = attention_probabilities(AttentionInputs(query, key, value, mask, scale)) @ value
    torch.testing.assert_close(found, fused, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_half_precision_on_a_cpu_is_computed_in_float32(dtype: torch.dtype, kind: str) -> None:
    """Also under autocast: the probabilities match float64 to float32 accuracy."""
    query, key, value = (part.to(dtype) for part in draw())
    mask = some_mask(kind)
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    exact = AttentionInputs(*(part.double() for part in (query, key, value)))
    expected = attention_probabilities(exact._replace(mask=mask), slice(1, 4)).float()
    attention = AttentionInputs(query, key, value, mask)
    for keys in (key, key.float()):  # as a caller has them who asks for several parts
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found = attention_probabilities(attention._replace(key=keys), slice(1, 4))
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_autocast_does_not_round_a_float32_query() -> None:
    query, key, value = (part.float() for part in draw())
    expected = attention_probabilities(AttentionInputs(query, key, value))
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_probabilities(AttentionInputs(query, key, value.bfloat16()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_best_in_order_is_ascending() -> None:
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


def test_keep_best_keeps_prefix_and_best_in_order() -> None:
    tokens, scores = torch.randn(2, 6, 3), torch.tensor([[0.1, 0.9, 0.3, 0.8], [5.0, 4.0, 3.0, 6.0]])
    reduced = keep_best(tokens, scores, remove=2, num_prefix_tokens=2)
    assert reduced.positions.tolist() == [[0, 1, 3, 5], [0, 1, 2, 5]]
    assert torch.equal(reduced.tokens[1], tokens[1, [0, 1, 2, 5]])
    assert reduced.sizes is reduced.sources is None


class TestSources:
    @staticmethod
    def loop(positions: list[int], tokens: int) -> list[int]:
        """The reference for one image."""
        rest = positions.index(-1) if positions.count(-1) == 1 else -1
        return [positions.index(i) if i in positions else rest for i in range(tokens)]

    @pytest.mark.parametrize(
        "positions",
        [
            [[0, 1, 2, 3, 4, 5]],
            [[0, 3, 5], [1, 2, 4]],
            [[0, 3, -1], [0, 1, -1]],
            [[-1, 3, 5], [3, -1, 4]],
            [[-1, -1, 5], [0, -1, -1]],
            [[0, 2, -1], [0, 2, 4], [-1, 2, -1]],
            [[-1]],
        ],
        ids=["all", "dropped", "fused-last", "fused-anywhere", "several", "mixed", "one"],
    )
    def test_missing_sources_follow_from_positions(self, positions: list[list[int]]) -> None:
        reduced = ReductionOutput(torch.zeros(len(positions), len(positions[0]), 2), torch.tensor(positions))
        found = sources_of(reduced, 6)
        assert found.tolist() == [self.loop(row, 6) for row in positions]
        assert found.dtype == torch.int64
        compiled = torch.compile(sources_of, fullgraph=True, backend="eager")
        assert torch.equal(compiled(reduced, 6), found)

    def test_padding_has_no_sources(self) -> None:
        positions = torch.tensor([[0, 3, -1], [0, -1, -1]])
        sizes = torch.tensor([[1.0, 1.0, 0.0], [1.0, 4.0, 0.0]])
        found = sources_of(ReductionOutput(torch.zeros(2, 3, 2), positions, sizes), 5)
        assert found.tolist() == [[0, -1, -1, 1, -1], [0, 1, 1, 1, 1]]

    def test_given_sources_are_returned(self) -> None:
        said = torch.tensor([[1, 0, 1]])
        reduced = ReductionOutput(torch.zeros(1, 2, 2), torch.tensor([[1, -1]]), None, said)
        assert sources_of(reduced, 3) is said

    @pytest.mark.parametrize(
        "name",
        [
            *("pomt", "pomt-nearest", "topk", "evit", "shift", "random", "tome"),
            *("tome:order=concatenated", "pitome", "soft-merge"),
        ],
    )
    def test_sources_of_every_method_are_complete(self, name: str) -> None:
        """Each token that is left has a source, and methods that merge or fuse drop none."""
        method: Reduction = resolve(name)
        x, attention = torch.randn(2, 3, 12, 8), AttentionInputs(*torch.randn(3, 3, 2, 12, 4))
        reduced = method.reduce(TokenSequence(x[0], 1, True, attention, entering=x[1], trace=True), 4)
        sources = sources_of(reduced, 12)
        for row, positions in zip(sources.tolist(), reduced.positions.tolist(), strict=True):
            assert set(row) - {-1} == set(range(8))
            assert row[0] == 0
            assert all(row[place] == k for k, place in enumerate(positions) if place >= 0)
            fuses = method.is_lossless or -1 in positions
            assert row.count(-1) == (0 if fuses else 4)
            assert positions.count(-1) == method.fused_tokens
