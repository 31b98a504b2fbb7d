from importlib import import_module

import pytest
import torch
from torch import Tensor

from helpers import reference as naive
from lightning_prune.reduction import POMT, AttentionInputs, TokenSequence, functional, pomt_reduce, pomt_scores

_module = import_module("lightning_prune.reduction.pomt")  # by its path: the package calls the function so
_CHUNK = _module._CHUNK


def draw(
    batch: int, heads: int, tokens: int, channels: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, AttentionInputs]:
    """Random tokens with query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(3)
    )
    x = torch.randn(batch, tokens, heads * channels, generator=generator, dtype=torch.float64).to(dtype)
    return x, AttentionInputs(query, key, value)


def image(attention: AttentionInputs, index: int) -> tuple[Tensor, Tensor, Tensor]:
    return attention.query[index], attention.key[index], attention.value[index]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_scores_match_the_formula(prefix: int, heads: int, batch: int) -> None:
    _, attention = draw(batch, heads, prefix + 11)
    scores = pomt_scores(attention, prefix)
    expected = torch.tensor([naive.pomt_scores(*image(attention, b), prefix) for b in range(batch)]).double()
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)  # torch.tensor of floats is single precision
    expected = torch.tensor(
        [naive.pomt_scores(*image(attention, b), prefix) for b in range(batch)], dtype=torch.float64
    )
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_remove_up_to_max_removed_matches_the_reference(prefix: int, batch: int) -> None:
    tokens = prefix + 9
    x, attention = draw(batch, 2, tokens, seed=prefix)
    max_removed = POMT().max_removed(tokens, prefix)
    assert max_removed == 7
    for remove in range(1, max_removed + 1):
        reduced = pomt_reduce(x, attention, remove, prefix)
        assert reduced.tokens.shape == (batch, tokens - remove, x.shape[-1])
        for b in range(batch):
            expected, positions = naive.pomt(x[b], *image(attention, b), remove, prefix)
            assert reduced.positions[b].tolist() == positions
            torch.testing.assert_close(reduced.tokens[b], expected, rtol=1e-12, atol=1e-13)
            assert torch.equal(reduced.tokens[b, :-1], x[b, positions[:-1]]), "kept tokens keep their bits"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_lower_precision_matches_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    x, attention = draw(3, 2, 14, dtype=dtype)
    scores, reduced = pomt_scores(attention, 1), pomt_reduce(x, attention, 6, 1)
    assert scores.dtype == torch.float32
    assert reduced.tokens.dtype == dtype
    for b in range(3):
        expected = torch.tensor(naive.pomt_scores(*image(attention, b), 1))
        torch.testing.assert_close(scores[b], expected, rtol=tolerance, atol=tolerance)
        # What is fused is judged for the tokens that were really dropped: a low precision may rank near-ties otherwise.
        positions = reduced.positions[b].tolist()
        assert positions[:-1] == sorted(positions[:-1])
        assert positions[-1] == -1
        dropped = x[b].double()[[i for i in range(14) if i not in positions]]
        assert len(dropped) == 7
        torch.testing.assert_close(reduced.tokens[b, -1].double(), dropped.mean(0), rtol=tolerance, atol=tolerance)
        assert torch.equal(reduced.tokens[b, :-1], x[b, positions[:-1]])


def test_bfloat16_tokens_are_summed_in_float32() -> None:
    """Summed in bfloat16, 400 tokens of about 1 lose whole units."""
    _, attention = draw(1, 1, 401, dtype=torch.bfloat16)
    x = torch.full((1, 401, 2), 1.0, dtype=torch.bfloat16)
    x[:, ::2] = 1.5
    reduced = pomt_reduce(x, attention, 390, 1)
    dropped = [i for i in range(401) if i not in reduced.positions[0].tolist()]
    torch.testing.assert_close(reduced.tokens[0, -1].double(), x[0, dropped].double().mean(0), rtol=4e-3, atol=0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, attention = draw(5, 3, 21, dtype=torch.float32)
    attention = attention._replace(query=attention.query * torch.tensor([1.0, 9, 3, 0.1, 5]).view(5, 1, 1, 1))
    together = pomt_reduce(x, attention, 8, 1)
    for b in range(5):
        alone = pomt_reduce(x[b : b + 1], AttentionInputs(*(part[b : b + 1] for part in attention[:3])), 8, 1)
        assert torch.equal(alone.positions[0], together.positions[b])
        torch.testing.assert_close(alone.tokens[0], together.tokens[b], rtol=1e-5, atol=1e-6)


def test_prefix_queries_have_no_effect() -> None:
    """a_i sums over patch queries, so the query of CLS has no effect."""
    _, attention = draw(1, 2, 12)
    query = attention.query.clone()
    query[:, :, 0] = 100.0
    assert torch.equal(pomt_scores(attention, 1), pomt_scores(attention._replace(query=query), 1))


def test_the_value_softmax_includes_the_prefix() -> None:
    """s_i is a softmax over all tokens, so a CLS token with huge values makes it zero for patches."""
    _, attention = draw(1, 2, 12)
    value = attention.value.clone()
    value[:, :, 0] = 100.0
    scores = pomt_scores(attention._replace(value=value), 1)
    assert scores.max().item() == pytest.approx(1.0, abs=1e-12)


def test_the_class_returns_the_result_of_the_function() -> None:
    x, attention = draw(2, 2, 12)
    reduced = POMT().reduce(TokenSequence(x, 1, True, attention), 4)
    expected = pomt_reduce(x, attention, 4, 1)
    assert torch.equal(reduced.tokens, expected.tokens)
    assert torch.equal(reduced.positions, expected.positions)
    assert reduced.sizes is None


@pytest.mark.parametrize(
    ("tokens", "prefix", "max_removed"), [(197, 1, 194), (3, 1, 0), (2, 1, 0), (1, 1, 0), (4, 0, 2)]
)
def test_max_removed(tokens: int, prefix: int, max_removed: int) -> None:
    assert POMT().max_removed(tokens, prefix) == max_removed


def test_compiles_as_one_graph_without_data_dependence() -> None:
    x, attention = draw(2, 2, 12, dtype=torch.float32)
    compiled = torch.compile(pomt_reduce, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, attention, 4, 1).tokens, pomt_reduce(x, attention, 4, 1).tokens)


def received(attention: AttentionInputs, prefix: int) -> Tensor:
    """The formula in float64 with all queries at once."""
    query, key, value = (part.double() for part in attention[:3])
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if attention.mask is not None:
        mask = attention.mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    largest = logits.softmax(dim=-1).amax(dim=1)[:, prefix:, prefix:].sum(dim=1)
    magnitude = value.amax(dim=1).sum(dim=-1).softmax(dim=-1)
    return largest / largest.amax(dim=1, keepdim=True) + magnitude[:, prefix:]


class TestManyTokens:
    """The queries are processed in chunks."""

    @pytest.mark.parametrize("kind", ["none", "pairs", "heads", "keys", "bool"])
    @pytest.mark.parametrize("step", [1, 2, 3, 5, 10])
    @pytest.mark.parametrize("prefix", [0, 1, 5])
    def test_chunk_size_has_no_effect(self, monkeypatch: pytest.MonkeyPatch, prefix: int, step: int, kind: str) -> None:
        tokens = prefix + 11
        monkeypatch.setitem(_CHUNK, "cpu", step * 2 * tokens)
        _, attention = draw(3, 2, tokens)
        generator = torch.Generator().manual_seed(1)
        shape = {"pairs": (tokens, tokens), "heads": (1, 2, tokens, tokens), "keys": (3, 1, 1, tokens)}.get(kind)
        mask = None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "bool":
            mask = torch.eye(tokens, dtype=torch.bool) | (torch.rand(3, 1, tokens, tokens, generator=generator) > 0.4)
        attention = attention._replace(mask=mask)
        lengths: list[int] = []

        def watch(attention: AttentionInputs, queries: slice) -> Tensor:
            probabilities = functional.attention_probabilities(attention, queries)
            lengths.append(probabilities.shape[2])
            return probabilities

        monkeypatch.setattr(_module, "attention_probabilities", watch)
        found = pomt_scores(attention, prefix)
        torch.testing.assert_close(found, received(attention, prefix), rtol=1e-12, atol=0)
        assert 1 < len(lengths) < 12
        assert max(lengths) <= step
        assert sum(lengths) == 11

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_default_chunks_match_a_single_chunk(self, dtype: torch.dtype) -> None:
        _, attention = draw(1, 3, 702, dtype=dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        found = pomt_scores(attention, 1).double()
        torch.testing.assert_close(found, received(attention, 1), rtol=tolerance, atol=tolerance)

    def test_chunks_compile_as_one_graph(self) -> None:
        class Score(torch.nn.Module):
            def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return pomt_scores(AttentionInputs(query, key, value), 1)

        for tokens, parts in ((198, 1), (702, 2)):
            torch._dynamo.reset()
            _, attention = draw(1, 3, tokens, dtype=torch.float32)
            expected = pomt_scores(attention, 1)
            exported = torch.export.export(Score(), attention[:3])
            softmaxes = [node for node in exported.graph.nodes if "softmax" in str(node.target)]
            assert len(softmaxes) == parts + 1, "that of the values is one"
            compiled = torch.compile(Score(), fullgraph=True, backend="aot_eager")
            for run in (exported.module(), compiled):
                torch.testing.assert_close(run(*attention[:3]), expected, rtol=1e-5, atol=1e-6)
