"""BLIP's vision tower, alone and under a text decoder that writes captions."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lightning_prune as lp
from helpers.models import disturb
from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.reduction import RandomDrop, TokenSequence

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 4,
}


def tower() -> Any:
    torch.manual_seed(0)
    return disturb(transformers.BlipVisionModel(transformers.BlipVisionConfig(**SHAPE))).double()


def captioner() -> Any:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    text |= {"encoder_hidden_size": 32, "vocab_size": 40, "max_position_embeddings": 16, **special}
    config = transformers.BlipConfig(text_config=text, vision_config=SHAPE)
    return disturb(transformers.BlipForConditionalGeneration(config))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_what_is_found() -> None:
    found = find_vision_transformer(captioner())
    assert type(found.root).__name__ == "BlipVisionModel"
    assert (found.num_prefix_tokens, found.has_class_token, found.num_tokens, found.depth) == (1, True, 26, 4)


@torch.no_grad()
def test_random_tokens_go_between_attention_and_mlp(images: Tensor) -> None:
    model = tower()
    x = model.embeddings(images)
    for index, layer in enumerate(model.encoder.layers):
        x = x + layer.self_attn(layer.layer_norm1(x))[0]
        if index in (1, 3):
            x = RandomDrop().reduce(TokenSequence(x, 1, True), 6 if index == 1 else 3).tokens
        x = x + layer.mlp(layer.layer_norm2(x))
    expected = model.post_layernorm(x)
    with lp.patch(model, "random", [0, 6, 0, 3]):
        torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("method", ["pomt", "topk", "evit", "shift", "tome:proportional_attention=false"])
def test_methods(images: Tensor, method: str) -> None:
    model = tower()
    dense = model(images)
    with lp.patch(model, method, [0, 6, 0, 3]):
        found = model(images)
        alone = model(images[1:])
    assert found.last_hidden_state.shape == (2, 17, 32)
    torch.testing.assert_close(alone.pooler_output, found.pooler_output[1:])
    assert torch.equal(model(images).last_hidden_state, dense.last_hidden_state)
    with lp.patch(model, method, [0, 6, 0, 3], restore="auto"):
        states = model(images, output_hidden_states=True).hidden_states
    assert {x.shape for x in states} == {(2, 26, 32)}


@torch.no_grad()
def test_scores_are_those_of_the_real_attention(images: Tensor) -> None:
    """Top-K keeps the tokens with the largest weights in the row of CLS."""
    model = tower()
    weights = model(images, output_attentions=True).attentions[1][:, :, 0, 1:].mean(1)
    kept = weights.topk(20).indices.sort(dim=1).values
    trace = lp.trace_tokens(model, images, "topk", [0, 5, 0, 0])
    for b in range(2):
        assert [i for i, group in enumerate(trace.groups[b].tolist()) if group >= 0] == kept[b].tolist()


@torch.no_grad()
def test_captions() -> None:
    model = captioner()
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    dense = model.generate(images, max_new_tokens=6, do_sample=False)
    with lp.patch(model, "topk", [0, 0, 0, 0]):
        assert torch.equal(model.generate(images, max_new_tokens=6, do_sample=False), dense)
    with lp.patch(model, "topk", [0, 20, 0, 0]):
        pruned = model.generate(images, max_new_tokens=6, do_sample=False)
        states = model.vision_model(images).last_hidden_state
    assert states.shape == (2, 6, 32)
    assert pruned.shape[0] == 2
    assert torch.equal(model.generate(images, max_new_tokens=6, do_sample=False), dense)


def test_sizes_cannot_weight_its_attention() -> None:
    with pytest.raises(UnsupportedModelError, match="proportional_attention=False"):
        lp.patch(tower(), "tome", [0, 3, 0, 0])


@torch.no_grad()
def test_the_exact_tail_on_request(images: Tensor) -> None:
    model = tower()
    dense = model(images).pooler_output
    with lp.patch(model, "exact", tail=True) as handle:
        found = model(images)
    assert handle.schedule is not None
    torch.testing.assert_close(found.pooler_output, dense, rtol=1e-12, atol=1e-12)
    assert found.last_hidden_state.shape[1] == 1
