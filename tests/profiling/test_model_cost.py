"""Multiply-accumulates and memory of a forward pass, against figures by hand."""

import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_hugging_face_vit, tiny_torchvision_vit, tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_cost import _LiveMemory, count_model_cost

C, DEPTH, CLASSES, PATCH, N = 32, 4, 5, 8, 17


def macs_by_hand(hidden, outputs=CLASSES, leaving=(N,) * DEPTH):
    """Of one image: embedding, head, and in each block qkv, both products of attention, projection and MLP."""
    total = (N - 1) * C * 3 * PATCH**2 + C * outputs
    for entering, left in zip((N, *leaving), leaving, strict=False):
        total += entering * C * 3 * C + 2 * entering**2 * C + entering * C * C
        total += 2 * left * C * hidden
    return total


def hidden_of(model):
    return model.blocks[0].mlp.fc1.out_features


def cost(model, images, patch=None):
    transformer = find_vision_transformer(model)
    with ready_to_run(transformer):
        if patch is None:
            return count_model_cost(transformer, images)
        with lp.patch(model, *patch):
            return count_model_cost(transformer, images)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_multiply_accumulates_of_dense_are_those_of_an_image(batch, fused):
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert cost(model, noise_images(batch)).gmacs == pytest.approx(macs_by_hand(hidden_of(model)) / 1e9, rel=1e-9)


def test_a_schedule_saves_the_multiply_accumulates_of_the_removed_tokens():
    model = tiny_vit()
    removed = [0, 6, 0, 0]
    found = cost(model, noise_images(2), ("random", removed)).gmacs
    assert found == pytest.approx(macs_by_hand(hidden_of(model), leaving=(17, 11, 11, 1)) / 1e9, rel=1e-9)


@pytest.mark.parametrize(
    ("build", "outputs"),
    [(tiny_torchvision_vit, 5), (lambda: tiny_hugging_face_vit("ViTForImageClassification"), 2)],
    ids=["torchvision", "Hugging Face"],
)
def test_other_libraries_are_counted_as_well(build, outputs):
    """Also torchvision's attention, which torch runs as one fused operation."""
    found = cost(build(), noise_images(2))
    assert found.gmacs == pytest.approx(macs_by_hand(64, outputs) / 1e9, rel=1e-9)


def test_memory_is_weights_and_the_largest_activations():
    model = tiny_vit()
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    hidden = hidden_of(model)
    for batch in (1, 8):
        found = cost(model, noise_images(batch)).peak_memory_mib * 2**20 - weights
        tokens = batch * N * 4
        least = tokens * (2 * hidden + C) + batch * 3 * 32 * 32 * 4  # before and after GELU, the residual, the images
        assert least <= found <= 2 * least


def test_what_is_freed_does_not_count():
    x = torch.zeros(1024)
    with _LiveMemory(x) as live:
        for _ in range(10):
            y = x + 1
            z = y[::2].view(2, -1)  # no memory of its own
            del y, z
        kept = [x * number for number in range(3)]
        kept[0].add_(1)
    assert live.peak_bytes == 4096 * (1 + 3)
    assert len(kept) == 3


def test_compiled_models_are_counted_without_compiling():
    model = tiny_vit()
    expected = cost(model, noise_images(2))
    model.compile(backend="eager")
    assert cost(model, noise_images(2)) == expected
    assert vars(model)["_compiled_call_impl"] is not None
