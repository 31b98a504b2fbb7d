import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.reference_tome import matching, merged, published
from lightning_prune.errors import ArgumentError
from lightning_prune.reduction import AttentionInputs, TokenSequence, ToMe, bipartite_matching, resolve
from lightning_prune.reduction.merging import merge


def draw(batch: int, tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, AttentionInputs]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, 3, tokens, 4, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randn(batch, tokens, 6, generator=generator, dtype=torch.float64).to(dtype), AttentionInputs(q, k, v)


def draw_sizes(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, 9, (batch, tokens), generator=torch.Generator().manual_seed(3)).float()


def pairs_of(source: Tensor, destination: Tensor) -> set[tuple[int, int]]:
    return set(zip(source.tolist(), destination.tolist(), strict=True))


@pytest.mark.parametrize("patches", [2, 3, 10, 11])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_remove_up_to_max_removed_matches_the_reference(batch: int, prefix: int, patches: int) -> None:
    tokens = prefix + patches
    x, attention = draw(batch, tokens, seed=prefix)
    max_removed = ToMe().max_removed(tokens, prefix)
    assert max_removed == patches // 2
    for remove in range(1, max_removed + 1):
        for sizes in (None, draw_sizes(batch, tokens)):
            found = ToMe().reduce(TokenSequence(x, prefix, prefix > 0, attention, sizes, trace=True), remove)
            assert found.tokens.shape == (batch, tokens - remove, 6)
            assert found.sizes is not None
            assert found.sources is not None
            for b in range(batch):
                pairs = matching(attention.key[b], remove, prefix)
                before = [1.0] * tokens if sizes is None else sizes[b].tolist()
                rows, kept, weights, sources = merged(x[b], pairs, before)
                torch.testing.assert_close(found.tokens[b], rows, rtol=1e-12, atol=1e-13)
                assert found.positions[b].tolist() == kept
                assert found.sizes[b].tolist() == weights
                assert found.sources[b].tolist() == sources
                assert kept[:prefix] == list(range(prefix))


@pytest.mark.parametrize("patches", [3, 10])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_the_concatenated_order_matches_the_paper(prefix: int, patches: int) -> None:
    """Sources at even places, counted with the prefix; prefix, sources that are left, destinations."""
    method, tokens = ToMe(order="concatenated"), prefix + patches
    x, attention = draw(2, tokens, seed=prefix)
    for remove in range(1, method.max_removed(tokens, prefix) + 1):
        sizes = draw_sizes(2, tokens) if remove % 2 else None
        found = method.reduce(TokenSequence(x, prefix, prefix > 0, attention, sizes, trace=True), remove)
        assert found.sizes is not None
        assert found.sources is not None
        for b in range(2):
            before = [1.0] * tokens if sizes is None else sizes[b].tolist()
            rows, places, weights, sources = published(x[b], attention.key[b], remove, prefix, before)
            torch.testing.assert_close(found.tokens[b], rows, rtol=1e-12, atol=1e-13)
            assert found.positions[b].tolist() == places
            assert found.sizes[b].tolist() == weights
            assert found.sources[b].tolist() == sources
            source, destination = bipartite_matching(attention.key[b : b + 1], remove, prefix, "concatenated")
            assert {*source[0].tolist()} == {*range(tokens)} - {*places}
            assert {*destination[0].tolist()} <= {*places[prefix:]}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_lower_precision_matches_the_reference(prefix: int, dtype: torch.dtype, tolerance: float) -> None:
    """The matching uses the keys in their precision, but is computed in float32."""
    x, attention = draw(3, prefix + 21, dtype)
    sizes = draw_sizes(3, prefix + 21)
    found = ToMe().reduce(TokenSequence(x, prefix, prefix > 0, attention, sizes), 8)
    assert found.tokens.dtype == dtype
    assert found.sizes is not None
    assert found.sizes.dtype == torch.float32
    for b in range(3):
        rows, kept, weights, _ = merged(x[b], matching(attention.key[b], 8, prefix), sizes[b].tolist())
        assert found.positions[b].tolist() == kept
        assert found.sizes[b].tolist() == weights
        torch.testing.assert_close(found.tokens[b].double(), rows, rtol=tolerance, atol=tolerance / 10)


def test_tokens_that_are_not_merged_are_bit_identical() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, attention = draw(2, 41, dtype)
        found = ToMe().reduce(TokenSequence(x, 1, True, attention, draw_sizes(2, 41), trace=True), 12)
        assert found.sources is not None
        for b in range(2):
            alone = [i for i, count in enumerate(found.sources[b].bincount().tolist()) if count == 1]
            assert len(alone) > 10
            assert torch.equal(found.tokens[b, alone], x[b, found.positions[b, alone]])


def test_sizes_sum_to_the_number_of_patches() -> None:
    """After ten reductions the sizes sum to the number of patches, and the weighted tokens to the sum of all tokens."""
    x, _ = draw(2, 200)
    expected, sizes, tokens = x.sum(dim=1), None, x
    for step in range(10):
        _, attention = draw(2, tokens.shape[1], seed=step)
        reduced = ToMe().reduce(TokenSequence(tokens, 1, True, attention, sizes), 17)
        tokens, sizes = reduced.tokens, reduced.sizes
        assert sizes is not None
        assert sizes.sum(dim=1).tolist() == [200, 200]
        assert sizes[:, 0].tolist() == [1, 1], "nothing goes into a prefix token"
    assert sizes is not None
    assert sizes.max() > 3
    torch.testing.assert_close((tokens * sizes.unsqueeze(2)).sum(dim=1), expected, rtol=1e-10, atol=1e-10)


def test_many_bfloat16_tokens_are_merged_in_float32() -> None:
    """In bfloat16 the sum of 300 tokens of 1 and one of 3 would be 256, and the size could not be represented."""
    x = torch.ones(2, 302, 4, dtype=torch.bfloat16)
    x[:, 300] = 4.0
    source = torch.arange(301).expand(2, -1)
    reduced = merge(x, source, torch.full_like(source, 301))
    assert reduced.sizes is not None
    assert reduced.sizes.tolist() == [[302.0], [302.0]]
    assert torch.equal(reduced.tokens, torch.full_like(reduced.tokens, 305 / 302))
    assert reduced.positions.tolist() == [[301], [301]]


def test_autocast_does_not_round_tokens() -> None:
    """A matrix product would be rounded to bfloat16 by autocast, also for kept tokens."""
    x, attention = draw(2, 41, torch.float32)
    source, destination = bipartite_matching(attention.key, 15, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = merge(x, source, destination)
        assert ToMe().reduce(TokenSequence(x, 1, True, attention), 15).tokens.dtype == torch.float32
    assert torch.equal(found.tokens, merge(x, source, destination).tokens)


def test_autocast_does_not_change_the_pairs() -> None:
    """With nearly equal keys, whose cosines would be equal in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 8, generator=generator)[torch.arange(60) % 4]
    key = kinds + 0.05 * torch.randn(2, 3, 60, 8, generator=generator)
    expected = bipartite_matching(key, 20, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = bipartite_matching(key, 20, 1)
    for b in range(2):
        assert pairs_of(found[0][b], found[1][b]) == pairs_of(expected[0][b], expected[1][b])


def test_zero_keys_give_finite_results() -> None:
    x, attention = draw(1, 21)
    key = attention.key.clone()
    key[:, :, 4] = 0.0
    found = ToMe().reduce(TokenSequence(x, 1, True, attention._replace(key=key)), 9)
    assert found.tokens.isfinite().all()
    assert 4 in found.positions[0].tolist()


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, attention = draw(5, 60, torch.float32)
    sizes = draw_sizes(5, 60)
    together = ToMe().reduce(TokenSequence(x, 1, True, attention, sizes), 20)
    for b in range(5):
        part = slice(b, b + 1)
        alone = ToMe().reduce(
            TokenSequence(x[part], 1, True, AttentionInputs(*(a[part] for a in attention[:3])), sizes[part]), 20
        )
        assert torch.equal(alone.positions[0], together.positions[b])
        torch.testing.assert_close(alone.tokens[0], together.tokens[b], rtol=1e-5, atol=1e-6)


def test_prefix_tokens_are_never_merged() -> None:
    """Even if CLS has the key of a patch; the alternation starts after the prefix."""
    _, attention = draw(2, 12)
    key = attention.key.clone()
    key[:, :, :2] = key[:, :, 5:7]
    source, destination = bipartite_matching(key, 5, 2)
    alone = bipartite_matching(key[:, :, 2:], 5, 0)
    for b in range(2):
        assert pairs_of(source[b] - 2, destination[b] - 2) == pairs_of(alone[0][b], alone[1][b])
    assert (source % 2 == 1).all()
    assert (destination % 2 == 0).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    x, attention = draw(2, 30, torch.float32)
    sizes = draw_sizes(2, 30)

    def reduce(x: Tensor, key: Tensor, sizes: Tensor) -> Any:
        return ToMe().reduce(TokenSequence(x, 1, True, AttentionInputs(key, key, key), sizes, trace=True), 9)

    found = torch.compile(reduce, fullgraph=True, backend=backend)(x, attention.key, sizes)
    for each, expected in zip(found, reduce(x, attention.key, sizes), strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)


def test_gradients_match_those_of_the_mean() -> None:
    x, attention = draw(1, 9)
    source, destination = bipartite_matching(attention.key, 3, 1)
    assert torch.autograd.gradcheck(lambda x: merge(x, source, destination).tokens, x.requires_grad_())


@pytest.mark.parametrize(
    ("tokens", "prefix", "max_removed"), [(197, 1, 98), (198, 1, 98), (3, 1, 1), (2, 1, 0), (1, 5, 0)]
)
def test_max_removed(tokens: int, prefix: int, max_removed: int) -> None:
    assert ToMe().max_removed(tokens, prefix) == max_removed


def test_attributes() -> None:
    method = ToMe()
    assert resolve("tome") == method
    assert (method.site, method.reads, method.tracks_sizes, method.is_lossless) == ("block", {"attention"}, True, True)
    assert (method.proportional_attention, method.schedule, method.adaptive) == (True, "constant", False)
    other = ToMe(False, "decreasing")
    assert repr(other) == "ToMe(proportional_attention=False, schedule='decreasing', order='kept')"
    assert other.settings() == {"proportional_attention": False, "schedule": "decreasing", "order": "kept"}
    assert len({method, ToMe(), other, ToMe(False), ToMe(order="concatenated")}) == 4
    assert copy.deepcopy(other) == other
    assert pickle.loads(pickle.dumps(other)) == other


def test_invalid_arguments_are_rejected() -> None:
    anything: Any = ToMe
    with pytest.raises(ArgumentError, match="`proportional_attention` must be True or False, got 'yes'"):
        anything("yes")
    with pytest.raises(ArgumentError, match="`order` must be 'kept' or 'concatenated', got 'sorted'"):
        anything(order="sorted")
    with pytest.raises(ArgumentError, match="`schedule` must be 'constant' or 'decreasing', got 'rising'"):
        anything(schedule="rising")
    with pytest.raises(ArgumentError, match=r"`schedule` must be 'constant' or 'decreasing', got \['constant'\]"):
        anything(schedule=["constant"])
