"""OpenCLIP's own image tower."""

import copy
import pickle
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

import lightning_prune as lp
from helpers.models import disturb
from lightning_prune.classification import zero_shot
from lightning_prune.errors import ArgumentError, UnsupportedModelError, WeightsError
from lightning_prune.patching import find_vision_transformer, has_exact_tail
from lightning_prune.reduction import RandomDrop, TokenSequence

SHAPE: dict[str, Any] = {"image_size": 20, "patch_size": 4, "width": 32, "layers": 4, "heads": 4, "mlp_ratio": 2.0}


def tower(**more: Any) -> Any:
    torch.manual_seed(0)
    return disturb(VisionTransformer(**{**SHAPE, "output_dim": 16, **more})).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_what_is_found() -> None:
    found = find_vision_transformer(tower())
    facts = (found.num_prefix_tokens, found.has_class_token, found.num_tokens, found.embed_dim, found.depth)
    assert facts == (1, True, 26, 32, 4)
    assert not found.pools_patches
    assert find_vision_transformer(tower(pool_type="avg")).pools_patches
    clip = small_clip()
    assert find_vision_transformer(clip).root is clip.visual  # and not the text tower


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["tok", "avg"])
def test_random_tokens_go_between_attention_and_mlp(images: Tensor, pooling: str) -> None:
    model = tower(pool_type=pooling)
    x = model._embeds(images)
    for index, block in enumerate(model.transformer.resblocks):
        heads = block.attn.num_heads
        parts = torch.nn.functional.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        query, key, value = (p.unflatten(2, (heads, -1)).transpose(1, 2) for p in parts.chunk(3, dim=2))
        attended = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(dim=3) @ value
        x = x + block.attn.out_proj(attended.transpose(1, 2).flatten(2))
        if index in (1, 3):
            x = RandomDrop().reduce(TokenSequence(x, 1, True), 6 if index == 1 else 3).tokens
        x = x + block.mlp(block.ln_2(x))
    x = model.ln_post(x)
    expected = (x[:, 0] if pooling == "tok" else x[:, 1:].mean(1)) @ model.proj
    with lp.patch(model, "random", [0, 6, 0, 3], tail=False):
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("method", ["pomt", "tome", "topk", "evit", "pitome", "pomt-nearest", "shift", "vwt-intra"])
def test_methods(images: Tensor, method: str) -> None:
    model = tower()
    dense = model(images)
    with lp.patch(model, method, [0, 6, 0, 3] if method != "vwt-intra" else [6, 0, 0, 0]):
        found = model(images)
        twins = [twin(images) for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))]
        alone = model(images[1:])
    assert found.shape == dense.shape
    assert not torch.equal(found, dense)
    assert all(torch.equal(each, found) for each in twins)
    torch.testing.assert_close(alone, found[1:])
    assert torch.equal(model(images), dense)


@torch.no_grad()
def test_the_exact_tail(images: Tensor) -> None:
    model = tower()
    dense = model(images)
    assert has_exact_tail(find_vision_transformer(model))
    with lp.patch(model, "exact") as handle:
        torch.testing.assert_close(model(images), dense, rtol=1e-12, atol=1e-12)
        assert handle.has_tail
    for other in (tower(pool_type="avg"), tower(output_tokens=True), tower(attentional_pool=True, attn_pooler_heads=4)):
        assert not has_exact_tail(find_vision_transformer(other))


@torch.no_grad()
def test_tokens_are_given_back(images: Tensor) -> None:
    model = tower(output_tokens=True)
    pooled, tokens = model(images)
    with lp.patch(model, "topk", [0, 6, 0, 3], restore="auto"):
        found, restored = model(images)
    assert restored.shape == tokens.shape == (2, 25, 32)
    with lp.patch(model, "topk", [0, 6, 0, 3]):
        short, left = model(images)
    assert left.shape == (2, 16, 32)
    assert torch.equal(found, short)
    assert not torch.equal(found, pooled)


@pytest.mark.long
@torch.no_grad()
def test_compiles_and_exports(images: Tensor) -> None:
    model, small = tower().float(), images.float()
    with lp.patch(model, "tome", [0, 6, 0, 3]):
        expected = model(small)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(small), expected)
        exported = torch.export.export(model, (small,)).module()
        torch.testing.assert_close(exported(small), expected, rtol=1e-4, atol=1e-5)


def test_what_is_refused() -> None:
    model = tower()
    model.transformer.batch_first = False
    with pytest.raises(UnsupportedModelError, match="batch_first"):
        lp.patch(model, "tome", [0, 3, 0, 0])
    dropping = tower(patch_dropout=0.5).train()
    with pytest.raises(UnsupportedModelError, match="evaluation mode"):
        lp.patch(dropping, "tome", [0, 3, 0, 0])


def small_clip() -> Any:
    torch.manual_seed(0)
    vision = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return disturb(open_clip.model.CLIP(16, vision, text)).eval()


@torch.no_grad()
def test_zero_shot() -> None:
    clip, names = small_clip(), ["cat", "zebra", "gnu"]
    tokenizer = open_clip.SimpleTokenizer()
    model = zero_shot(clip, names, ["a photo of a {}."], tokenizer)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = clip.encode_text(tokenizer([f"a photo of a {name}." for name in names]), normalize=True)
    expected = clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ texts.T
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert find_vision_transformer(model).num_classes == 3
    with lp.patch(model, "tome", [0, 3, 0]):
        assert not torch.allclose(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "is_quick"), [("ViT-B-32/openai", True), ("ViT-B-32/laion2b_e16", False)])
def test_weights_say_which_gelu_they_were_trained_with(monkeypatch: Any, name: str, is_quick: bool) -> None:
    seen: dict[str, Any] = {}

    def create(kind: str, **options: Any) -> Any:
        seen.update(options, kind=kind)
        return small_clip()

    monkeypatch.setattr(open_clip, "create_model", create)
    zero_shot(f"openclip:{name}", ["cat", "dog"])
    assert (seen["kind"], seen["force_quick_gelu"]) == ("ViT-B-32", is_quick)


@torch.no_grad()
def test_a_grid_needs_all_tokens(images: Tensor) -> None:
    model = tower()
    dense = model.forward_intermediates(images)["image_intermediates"]
    with lp.patch(model, "topk", [0, 6, 0, 3]), pytest.raises(UnsupportedModelError, match="output_fmt"):
        model.forward_intermediates(images)
    with lp.patch(model, "topk", [0, 6, 0, 3], restore="auto"):
        found = model.forward_intermediates(images)["image_intermediates"]
    assert [x.shape for x in found] == [x.shape for x in dense]
    assert torch.equal(found[0], dense[0])


@torch.no_grad()
def test_towers_that_also_return_tokens_classify() -> None:
    clip = small_clip()
    clip.visual.output_tokens = True
    tokenizer = open_clip.SimpleTokenizer()
    both = zero_shot(clip, ["cat", "dog"], tokenizer=tokenizer)(torch.zeros(1, 3, 32, 32))
    plain = zero_shot(small_clip(), ["cat", "dog"], tokenizer=tokenizer)(torch.zeros(1, 3, 32, 32))
    assert torch.equal(both, plain)


def test_names(tmp_path: Any) -> None:
    with pytest.raises(ArgumentError, match="ViT-B-99"):
        zero_shot("openclip:ViT-B-99/openai", ["cat"])
    with pytest.raises(ArgumentError, match="weights after a slash"):
        zero_shot("openclip:ViT-B-32", ["cat"])
    with pytest.raises(WeightsError, match="nowhere"):
        zero_shot(f"openclip:ViT-B-32/{tmp_path}/nowhere.pt", ["cat"])
