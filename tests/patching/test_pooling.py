"""Models that pool over patch tokens: merged tokens are weighted by their number of patches."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from timm.models.cait import Cait
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import lightning_prune as lp
from helpers.models import disturb
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.reduction import ReductionOutput, TokenSequence

from .by_hand import Pairs
from .huggingface_models import build_hf, outputs_of

SMALL: dict[str, Any] = {"img_size": 20, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 7}


class Merged(Pairs):
    """A lossless reduction that merges pairs and returns sources."""

    name: ClassVar[str] = "merged"
    is_lossless = True

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        reduced, prefix, count = super().reduce(sequence, remove), sequence.num_prefix_tokens, sequence.tokens.shape[1]
        if not sequence.trace:
            return reduced
        row = [*range(prefix), *(prefix + i // 2 for i in range(2 * remove))]
        row += [i - remove for i in range(prefix + 2 * remove, count)]
        return reduced._replace(sources=torch.tensor(row).expand(len(sequence.tokens), -1))


def spread_out(tokens: Tensor, removed: list[int], prefix: int) -> Tensor:
    """Restores every merged token at each of its positions, by a loop over the pairs."""
    count = tokens.shape[1] + sum(removed)
    at = list(range(count))
    for remove in removed:
        now = [*range(prefix), *(prefix + i // 2 for i in range(2 * remove))]
        now += [i - remove for i in range(prefix + 2 * remove, count)]
        at = [now[i] for i in at]
    return tokens[:, at]


TIMM: dict[str, Callable[[], nn.Module]] = {
    "relpos": lambda: disturb(VisionTransformerRelPos(**SMALL, global_pool="avg", class_token=False)),
    "cait": lambda: disturb(Cait(**{**SMALL, "depth_token_only": 1})),
}
HF = ["SiglipVisionModel", "SiglipForImageClassification", "Dinov2ForImageClassification", "CLIPForImageClassification"]


@torch.no_grad()
def check(model: Any, images: Tensor, run: Callable[[Any], Tensor], method: Merged, removed: list[int]) -> None:
    transformer = find_vision_transformer(model)
    assert transformer.pools_patches
    last, left = transformer.blocks[-1], []
    with lp.patch(model, Pairs(method.proportional_attention), removed):  # does not say that nothing is lost
        hook = last.register_forward_hook(lambda module, args, x: left.append(x))
        unweighted = run(model)
        hook.remove()
    reference = copy.deepcopy(model)
    everywhere = spread_out(left[0], removed, transformer.num_prefix_tokens)
    find_vision_transformer(reference).blocks[-1].register_forward_hook(lambda *_: everywhere)
    expected = run(reference)
    with lp.patch(model, method, removed):
        found = run(model)
    assert (found - expected).abs().max() < 1e-10
    assert (found - unweighted).abs().max() > 1e-4


@pytest.mark.parametrize("removed", [[0, 5, 0, 0], [6, 0, 0, 4]], ids=["one", "last too"])
class TestPoolingWeights:
    @pytest.mark.parametrize("name", ["pool-avg", "pool-avgmax", "siglip", "registers-without-class"])
    def test_plain(self, build: Any, images: Tensor, name: str, removed: list[int]) -> None:
        check(build(name).double(), images.double(), lambda m: m(images.double()), Merged(), removed)

    @pytest.mark.parametrize("name", TIMM)
    def test_other_timm(self, images: Tensor, name: str, removed: list[int]) -> None:
        method = Merged(proportional_attention=name != "cait")
        check(TIMM[name]().double(), images.double(), lambda m: m(images.double()), method, removed)

    @pytest.mark.parametrize("name", HF)
    def test_hugging_face(self, images: Tensor, name: str, removed: list[int]) -> None:
        check(build_hf(name).double(), images.double(), lambda m: outputs_of(m(images.double())), Merged(), removed)


class Silent(Merged):
    """A lossless reduction that returns no sources."""

    name: ClassVar[str] = "silent"

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        return super().reduce(sequence, remove)._replace(sources=None)


def test_a_lossless_method_must_return_sources(build: Any, images: Tensor) -> None:
    with lp.patch(build(), Silent(), [0, 5, 0, 0]) as handle:
        assert handle.transformer.root(images).shape == (2, 7)
    message = "`ReductionOutput.sources` must be returned by silent .* got None"
    with lp.patch(build("pool-avg"), Silent(), [0, 5, 0, 0]) as handle, pytest.raises(ArgumentError, match=message):
        handle.transformer.root(images)


@pytest.mark.parametrize(
    ("name", "pools_patches"),
    [("vit", False), ("no-pool", False), ("distilled", False), ("pool-avg", True), ("pool-map-class", True)],
)
def test_which_timm_models_pool(build: Any, name: str, pools_patches: bool) -> None:
    assert find_vision_transformer(build(name)).pools_patches is pools_patches


@pytest.mark.parametrize(
    ("name", "pools_patches"),
    [("ViTForImageClassification", False), ("Dinov2Model", False), ("CLIPVisionModel", False)],
)
def test_which_hugging_face_models_pool(name: str, pools_patches: bool) -> None:
    assert find_vision_transformer(build_hf(name)).pools_patches is pools_patches


def test_a_class_token_model_is_not_restored(build: Any, images: Tensor, leaving: Any) -> None:
    model = build()
    with lp.patch(model, Merged(), [0, 5, 0, 0]):
        assert leaving(model, images) == (26, 21, 21, 21)


@pytest.mark.long
def test_compiles_and_exports(build: Any, images: Tensor) -> None:
    torch._dynamo.reset()  # of models of other tests it may have had enough
    model = build("pool-avg")
    with torch.no_grad(), lp.patch(model, Merged(), [0, 5, 0, 3]):
        expected = model(images)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)
