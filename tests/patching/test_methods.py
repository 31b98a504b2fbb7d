"""Every method in every family, compared with its reference on the tokens of the block."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_prune as lp
from helpers import reference as naive
from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.reduction import POMT, Reduction, ReductionOutput, SoftMerge, TokenSequence, resolve

from . import huggingface_models as hf
from . import test_torchvision as tv
from .conftest import build_vit, draw_images
from .sweep import coverage
from .test_timm_families import MODELS

REMOVED = [0, 5, 6, 0]
METHODS = ("topk", "evit", "shift", "pomt-nearest")
MERGING = ("pitome", "diffrate-merge", "soft-merge")  # they read what `pomt-nearest` reads, in every family
VITS = ("vit", "distilled", "siglip", "registers-without-class", "diff-attention", "res-post", "parallel-things")
TIMM = ("eva02", "dinov3", "naflex", "beit-own-bias", "relpos", "cait", "convit")
HUGGING = ("ViTModel", "Dinov2WithRegistersModel", "SiglipVisionModel")
FAMILIES = (*VITS, *TIMM, "torchvision", *HUGGING)
CASES = [(name, method) for name in FAMILIES for method in METHODS]
CASES += [(name, method) for name in ("vit", "siglip", "eva02", "ViTModel") for method in MERGING]
REST = [(name, method) for name in FAMILIES for method in MERGING if (name, method) not in CASES]
every_method = pytest.mark.parametrize("method", [*METHODS, *MERGING])


def build(name: str) -> tuple[Any, Tensor]:
    """A small model in double precision, and images for it."""
    if name == "torchvision":
        model, size = tv.build_tv(), (20, 20)
    elif name in HUGGING:
        model, size = hf.build_hf(name), (20, 20)
    elif name in VITS:
        model, size = build_vit(name), (20, 20)
    else:
        model = MODELS[name]()
        size = coverage.image_size(model)
    return model.double(), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()


class RecordingReduction(Reduction):
    """Wraps a reduction and records its inputs and outputs."""

    def __init__(self, other: Reduction) -> None:
        self.other, self.seen = other, list[tuple[TokenSequence, ReductionOutput]]()
        vars(self).update(name=other.name, reads=other.reads)
        self.is_lossless, self.tracks_sizes = other.is_lossless, other.tracks_sizes
        self.proportional_attention = other.proportional_attention

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        self.seen.append((sequence, self.other.reduce(sequence, remove)))
        return self.seen[-1][1]

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return self.other.max_removed(tokens, num_prefix_tokens)


def looped(
    method: str, given: TokenSequence, remove: int, b: int, class_token: bool
) -> tuple[Tensor, list[int], list[float] | None]:
    """The reference result of a method for one image."""
    x, prefix, attention = given.tokens[b], given.num_prefix_tokens, given.attention
    if method == "shift":
        assert attention is None
        return *naive.keep_best(x, naive.shift_scores(x, given.entering[b], prefix), remove, prefix), None
    query, key, value = (part[b] for part in attention[:3])
    mask = None if attention.mask is None else attention.mask.expand(len(given.tokens), len(query), len(x), len(x))[b]
    seen = naive.probabilities(query, key, attention.scale, mask)
    known = None if given.sizes is None else given.sizes[b].tolist()
    if method == "pomt-nearest":
        scores = naive.pomt_scores(query, key, value, prefix, seen)
        return naive.nearest(x, key, scores, remove, prefix, known)[:3]
    if method == "pitome":
        return naive.pitome(x, key, remove, prefix, 0.9 * (1 - given.block / given.depth), known)[:3]
    queries = [0] if class_token else list(range(prefix, len(x)))
    scores = [
        sum(head[j][i] for head in seen for j in queries) / (len(seen) * len(queries)) for i in range(prefix, len(x))
    ]
    if method == "diffrate-merge":
        return naive.nearest(x, key, scores, remove, prefix, known)[:3]
    if method == "soft-merge":
        return naive.soft_merge(x, key, scores, remove, prefix, SoftMerge().temperature, known)[:3]
    return *(naive.keep_best if method == "topk" else naive.evit)(x, scores, remove, prefix), None


@pytest.mark.parametrize(("name", "method"), [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in REST)])
def test_patched_outputs_match_the_loop(name: str, method: str) -> None:
    model, images = build(name)
    with_key_bias = name not in ("cait", "convit")  # their attention takes nothing that is added to its logits
    merging = method in ("pomt-nearest", *MERGING)
    reduction = resolve(method, proportional_attention=with_key_bias) if merging else resolve(method)
    watching = RecordingReduction(reduction)
    transformer = find_vision_transformer(model)
    with torch.no_grad():
        dense = model(images)
        with lp.patch(model, watching, REMOVED):
            pruned = model(images)
        after = model(images)
    first = [next(iter(each.values())) if isinstance(each, dict) else each for each in (dense, pruned, after)]
    assert torch.equal(first[0], first[2])
    assert first[1].isfinite().all()
    assert not torch.equal(first[1], first[0])
    assert [reduced.tokens.shape[1] for _, reduced in watching.seen] == [
        watching.seen[0][0].tokens.shape[1] - 5,
        watching.seen[0][0].tokens.shape[1] - 11,
    ]
    for (given, reduced), remove, block in zip(watching.seen, (5, 6), (1, 2), strict=True):
        assert (given.block, given.depth) == (block, 4)
        assert given.num_prefix_tokens == transformer.num_prefix_tokens
        for b in range(len(images)):
            left, positions, sizes = looped(method, given, remove, b, transformer.has_class_token)
            assert reduced.positions[b].tolist() == positions
            torch.testing.assert_close(reduced.tokens[b], left, rtol=1e-10, atol=1e-12)
            assert (reduced.sizes is None) is (sizes is None)
            assert reduced.sizes is None or reduced.sizes[b].tolist() == pytest.approx(sizes, rel=1e-10)


def test_sizes_weight_later_attention(images: Tensor) -> None:
    """Logits differ with and without sizes, and the second reduction receives the sizes of the first."""
    model, outputs = build_vit().double(), []
    for with_key_bias in (True, False):
        watching = RecordingReduction(POMT("nearest", with_key_bias))
        with lp.patch(model, watching, REMOVED), torch.no_grad():
            outputs.append(model(images.double()))
        (first, reduced), (second, _) = watching.seen
        assert first.sizes is None
        assert second.sizes is not None
        assert torch.equal(second.sizes, reduced.sizes)
        assert second.sizes.sum(1).tolist() == [26, 26]
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("name", ["cait", "convit"])
def test_models_without_key_bias_are_rejected(name: str) -> None:
    model, _ = build(name)
    with pytest.raises(UnsupportedModelError, match=r"pomt-nearest .*proportional_attention=False"):
        lp.patch(model, "pomt-nearest", REMOVED)


def test_shift_reads_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("attention was tapped")

    model = build_vit()
    monkeypatch.setattr(type(find_vision_transformer(model).adapter), "recorder", refuse)
    with lp.patch(model, "shift", REMOVED), torch.no_grad():
        assert model(draw_images()).shape == (2, 7)


@every_method
def test_an_image_does_not_depend_on_its_batch(method: str) -> None:
    model, images = build_vit().double(), draw_images(5).double()
    with lp.patch(model, method, REMOVED), torch.no_grad():
        together = model(images)
        for b in range(5):
            torch.testing.assert_close(model(images[b : b + 1])[0], together[b], rtol=1e-10, atol=1e-12)


@every_method
def test_in_low_precisions(method: str) -> None:
    model, images = build_vit(), draw_images()
    with lp.patch(model, method, REMOVED), torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
        low = model.bfloat16()(images.bfloat16())
    assert mixed.dtype == low.dtype == torch.bfloat16
    for output in (mixed, low):  # a token whose score is nearly that of another may take its place
        assert (output - expected).norm() < 0.2 * expected.norm()


@pytest.mark.long
@every_method
def test_compiles_and_exports_as_one_graph(method: str) -> None:
    torch._dynamo.reset()
    model, images = build_vit(), draw_images()
    with lp.patch(model, method, REMOVED), torch.no_grad():
        expected = model(images)
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=1e-5)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
