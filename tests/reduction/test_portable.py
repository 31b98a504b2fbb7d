"""The portable form of every method against the native form and the formulas, and the switch between them."""

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import reference as naive
from helpers import reference_tome
from lightning_prune.errors import ArgumentError
from lightning_prune.reduction import (
    Reduction,
    ReductionOutput,
    SoftMerge,
    TokenSequence,
    VWTInter,
    portable_graph,
    resolve,
)
from lightning_prune.reduction.functional import (
    keep_best,
    precise_product,
    select_best,
    sources_of,
    take_tokens,
    take_values,
)
from lightning_prune.reduction.portable import descending_ranks, is_portable, selection_matrix
from lightning_prune.reduction.vocabulary import Vocabulary

from .drawn import draw

SIDE, ROWS, COLUMNS = 2, 3, 5
PATCHES, REMOVE = ROWS * COLUMNS, 6
NAMES = ["pomt", "pomt-nearest", "tome", "topk", "evit", "shift", "random", "pitome", "diffrate-merge", "soft-merge"]
NAMES += ["tome:order=concatenated", "vwt-intra", "vwt-inter"]
every_method = pytest.mark.parametrize("name", NAMES)


def make(name: str) -> Reduction:
    if name != "vwt-inter":
        return resolve(name)
    words = torch.randn(4, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(5))
    return VWTInter(Vocabulary(words, SIDE), threshold=0.7, pad_to="image")


def sequence(name: str, batch: int, prefix: int, dtype: torch.dtype = torch.float64, merged: bool = False) -> Any:
    """A drawn sequence with images; `merged` gives the tokens sizes, as after an earlier block."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(batch, 3, ROWS * SIDE, COLUMNS * SIDE, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (batch, prefix + PATCHES), generator=generator).to(dtype) if merged else None
    return draw(batch, PATCHES, prefix, dtype=dtype, pixels=pixels.to(dtype), sizes=sizes, trace=True)


def both(method: Reduction, tokens: TokenSequence) -> tuple[ReductionOutput, ReductionOutput]:
    """The native and the portable result."""
    remove = 0 if method.adaptive else REMOVE
    native = method.reduce(tokens, remove)
    with portable_graph():
        return native, method.reduce(tokens, remove)


def check_same(native: ReductionOutput, portable: ReductionOutput, tolerance: float) -> None:
    torch.testing.assert_close(portable.tokens, native.tokens, rtol=tolerance, atol=tolerance)
    assert torch.equal(portable.positions, native.positions)
    for one, other in ((native.sizes, portable.sizes), (native.sources, portable.sources)):
        assert (one is None) is (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=0)  # those of soft-merge are no whole numbers
            assert one.dtype == other.dtype


@every_method
@pytest.mark.parametrize("merged", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_equals_the_native_form(name: str, merged: bool, batch: int, dtype: torch.dtype, tolerance: float) -> None:
    """In a first cut, and in one after tokens were merged; with no, one and several prefix tokens."""
    for prefix in (0, 1, 3):
        check_same(*both(make(name), sequence(name, batch, prefix, dtype, merged)), tolerance)


@every_method
@pytest.mark.parametrize("autocast", [False, True])
def test_kept_tokens_are_bit_identical(name: str, autocast: bool) -> None:
    """In half precision, and in float32 under autocast, which would round a matrix product."""
    dtype = torch.float32 if autocast else torch.bfloat16
    tokens = sequence(name, 2, 1, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        native, portable = both(make(name), tokens)
    assert torch.equal(portable.positions, native.positions)
    assert portable.tokens.dtype == dtype
    alone = native.positions >= 0 if native.sizes is None else (native.positions >= 0) & (native.sizes == 1)
    assert torch.equal(portable.tokens[alone], native.tokens[alone])
    torch.testing.assert_close(portable.tokens, native.tokens, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES[:-2])
@pytest.mark.parametrize("prefix", [1, 3])
def test_equals_the_formulas(name: str, prefix: int) -> None:
    method, tokens = resolve(name), sequence(name, 2, prefix, merged=True)
    with portable_graph():
        found = method.reduce(tokens, REMOVE)
    for b in range(2):
        x, entering = tokens.tokens[b], tokens.entering[b]
        query, key, value = (part[b] for part in tokens.attention[:3])
        sizes = tokens.sizes[b].tolist()
        if name == "pomt":
            expected: tuple[Any, ...] = naive.pomt(x, query, key, value, REMOVE, prefix)
        elif name == "pomt-nearest":
            scores = naive.pomt_scores(query, key, value, prefix)
            expected = naive.nearest(x, key, scores, REMOVE, prefix, sizes)
        elif name == "tome:order=concatenated":
            expected = reference_tome.published(x, key, REMOVE, prefix, sizes)
        elif name == "pitome":
            expected = naive.pitome(x, key, REMOVE, prefix, 0.9, sizes)
        elif name == "soft-merge":
            scores = naive.topk_scores(query, key, prefix, has_class_token=True)
            expected = naive.soft_merge(x, key, scores, REMOVE, prefix, SoftMerge().temperature, sizes)
        elif name == "diffrate-merge":
            scores = naive.topk_scores(query, key, prefix, has_class_token=True)
            expected = naive.nearest(x, key, scores, REMOVE, prefix, sizes)
        elif name == "tome":
            expected = reference_tome.merged(x, reference_tome.matching(key, REMOVE, prefix), sizes)
        elif name == "random":
            expected = naive.random(x, REMOVE, prefix, seed=0)
        elif name == "shift":
            expected = naive.keep_best(x, naive.shift_scores(x, entering, prefix), REMOVE, prefix)
        else:
            scores = naive.topk_scores(query, key, prefix, has_class_token=True)
            expected = (naive.evit if name == "evit" else naive.keep_best)(x, scores, REMOVE, prefix)
        torch.testing.assert_close(found.tokens[b], expected[0], rtol=1e-10, atol=1e-12)
        assert found.positions[b].tolist() == expected[1]
        for one, said in zip((found.sizes, found.sources), expected[2:], strict=False):
            assert one is not None
            assert one[b].tolist() == pytest.approx(said, rel=1e-12)


class TestTies:
    def test_the_first_of_equal_scores_is_preferred(self) -> None:
        scores = torch.randint(0, 3, (4, 12), generator=torch.Generator().manual_seed(0)).double()
        tokens = torch.randn(4, 14, 3)
        for keep in range(13):
            with portable_graph():
                reduced = keep_best(tokens, scores, 12 - keep, 2)
            expected = [[0, 1, *(2 + i for i in naive.best(row, keep))] for row in scores.tolist()]
            assert reduced.positions.tolist() == expected
            native = select_best(scores, keep, 2, stable=True)
            assert native.positions.tolist() == expected

    @pytest.mark.parametrize("name", ["pomt-nearest", "vwt-intra", "vwt-inter"])
    def test_equal_tokens_in_the_methods_that_rank_ties_by_position(self, name: str) -> None:
        """All keys, scores and pixels are equal."""
        tokens = sequence(name, 2, 1)
        same = tokens.attention._replace(
            **{part: torch.ones(2, 2, 16, 4).double() for part in ("query", "key", "value")}
        )
        check_same(*both(make(name), tokens._replace(attention=same, pixels=torch.ones_like(tokens.pixels))), 1e-12)

    def test_equally_similar_kept_tokens(self) -> None:
        """A token is merged into the one of them with the highest score, in both forms."""
        tokens = sequence("pomt-nearest", 3, 1)
        key = tokens.attention.key.sign()
        check_same(*both(resolve("pomt-nearest"), tokens._replace(attention=tokens.attention._replace(key=key))), 1e-12)

    def test_equally_similar_pairs(self) -> None:
        """The first sources are merged, each into the first destination."""
        tokens = sequence("tome", 1, 1)
        attention = tokens.attention._replace(key=torch.ones(1, 2, 16, 4).double())
        with portable_graph():
            found = resolve("tome").reduce(tokens._replace(attention=attention), REMOVE)
        expected = reference_tome.merged(tokens.tokens[0], [(i, 1) for i in range(2, 2 + 2 * REMOVE, 2)], [1.0] * 16)
        torch.testing.assert_close(found.tokens[0], expected[0])
        assert found.positions[0].tolist() == expected[1]
        assert found.sources is not None
        assert found.sources[0].tolist() == expected[3]


@every_method
@pytest.mark.parametrize("remove", ["one", "all"])
def test_the_fewest_and_the_most_tokens(name: str, remove: str) -> None:
    method, tokens = make(name), sequence(name, 2, 1)
    count = 0 if method.adaptive else 1 if remove == "one" else method.max_removed(16, 1)
    native = method.reduce(tokens, count)
    with portable_graph():
        check_same(native, method.reduce(tokens, count), 1e-12)
        assert torch.equal(sources_of(native, 16), sources_of(method.reduce(tokens, count), 16))


def test_selecting_by_index() -> None:
    tokens, index = torch.randn(2, 5, 3), torch.tensor([[4, 0, 0], [2, 2, 1]])
    counts = torch.randint(-9, 9, (2, 5))
    expected = take_tokens(tokens, index), take_values(tokens[..., 0], index), take_values(counts, index)
    with portable_graph():
        found = take_tokens(tokens, index), take_values(tokens[..., 0], index), take_values(counts, index)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


def test_ranks_and_rows_beyond_the_kept_tokens() -> None:
    assert descending_ranks(torch.tensor([[1.0, 3.0, 1.0, 2.0]])).tolist() == [[2, 0, 3, 1]]
    assert selection_matrix(torch.tensor([[False, True]]), 2).tolist() == [[[0, 1], [0, 0]]]


def test_padding_to_the_batch_cannot_be_exported() -> None:
    words, tokens = Vocabulary(torch.randn(4, 12), SIDE), sequence("vwt-inter", 2, 1)
    with pytest.raises(ArgumentError, match=r"`pad_to` must be 'image'.*got 'batch'"), portable_graph():
        VWTInter(words).reduce(tokens, 0)


@every_method
@pytest.mark.parametrize("form", [nullcontext, portable_graph], ids=["native", "portable"])
def test_exported_operators(name: str, form: Any) -> None:
    """Natively nothing is sorted except by TopK, sorted; in the portable form nothing is indexed, either."""
    prefix = 0 if form is portable_graph else 1
    method, tokens = make(name), sequence(name, 2, prefix, torch.float32, merged=True)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> ReductionOutput:
            attention = tokens.attention._replace(query=query, key=key, value=value)
            return method.reduce(tokens._replace(tokens=x, attention=attention), 0 if method.adaptive else REMOVE)

    inputs = (tokens.tokens, *tokens.attention[:3])
    expected = Module()(*inputs)
    with form():
        program = torch.export.export(Module(), inputs)
    check_same(expected, ReductionOutput(*program.module()(*inputs)), 1e-5)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    found = {str(node.target).removeprefix("aten.").split(".")[0].rstrip("_") for node in calls}
    refused = {"sort", "argsort", "new_ones", "wrap_with_autocast", "__rshift__"}
    if form is nullcontext:
        refused.add("alias")
    else:
        refused |= {"topk", "cumsum", "gather", "index", "index_select", "index_add", "nonzero", "unique"}
        refused |= {"scatter", "scatter_add", "scatter_reduce"}
        # OpenVINO divides by zero if it converts a concatenation with an empty part.
        joins = [node for node in calls if node.target is torch.ops.aten.cat.default]
        assert all(part.meta["val"].numel() for node in joins for part in node.args[0])
    assert not found & refused
    assert all(len(node.args) < 5 or node.args[4] for node in calls if "topk" in str(node.target))


class TestSwitch:
    def test_nested_and_after_an_error(self) -> None:
        with portable_graph():
            with portable_graph():
                assert is_portable()
            assert is_portable()
        assert not is_portable()
        with pytest.raises(ZeroDivisionError), portable_graph():
            _ = 1 / 0
        assert not is_portable()

    def test_another_thread_is_not_affected(self) -> None:
        seen: list[bool] = []
        with portable_graph():
            thread = threading.Thread(target=lambda: seen.append(is_portable()))
            thread.start()
            thread.join()
        assert seen == [False]

    def test_a_compiled_graph_follows_it(self) -> None:
        """Each form is compiled once as one graph, and the one that was asked for runs."""
        graphs: list[set[str]] = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append({str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes})
            return graph.forward

        def reduce(tokens: Tensor, scores: Tensor) -> Tensor:
            return keep_best(tokens, scores, 3, 1).tokens

        torch._dynamo.reset()
        compiled = torch.compile(reduce, backend=backend, fullgraph=True)
        inputs = torch.randn(2, 9, 4), torch.randn(2, 8)
        expected = reduce(*inputs)
        for _ in range(2):
            assert torch.equal(compiled(*inputs), expected)
            with portable_graph():
                assert torch.equal(compiled(*inputs), expected)
        assert ["topk" in graph for graph in graphs] == [True, False]

    def test_a_product_is_a_single_operation_in_an_exported_graph(self) -> None:
        class Product(torch.nn.Module):
            def forward(self, one: Tensor, other: Tensor) -> Tensor:
                return precise_product(one, other)

        program = torch.export.export(Product(), (torch.randn(2, 3, 4), torch.randn(2, 4, 5)))
        assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [torch.ops.aten.matmul.default]
