"""Adaptive reductions: shorter images are padded, and the padding has no effect."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import lightning_prune as lp
from helpers.models import disturb
from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.patching import find_vision_transformer, trace_tokens
from lightning_prune.reduction import Reduction, ReductionOutput, TokenSequence

from .huggingface_models import build_hf, outputs_of
from .test_torchvision import build_tv

SMALL: dict[str, Any] = {"img_size": 20, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 7}


class Bright(Reduction):
    """Keeps the patches with a positive mean, whatever their number."""

    name: ClassVar[str] = "bright"
    reads: ClassVar[frozenset[str]] = frozenset({"pixels"})
    site = "input"
    adaptive = tracks_sizes = proportional_attention = True

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        assert remove == 0
        assert sequence.pixels is not None
        stays = F.avg_pool2d(sequence.pixels.mean(1, keepdim=True), 4).flatten(1) > 0
        stays = torch.cat((stays.new_ones(len(stays), sequence.num_prefix_tokens), stays), 1)
        order = stays.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        order = order[:, : int(stays.sum(1).max())]
        kept = stays.gather(1, order)
        tokens = sequence.tokens.gather(1, order[..., None].expand(-1, -1, sequence.tokens.shape[-1]))
        return ReductionOutput(tokens, torch.where(kept, order, -1), kept.to(tokens.dtype))

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return 0

    def unsupported_reason(self, model: nn.Module) -> str | None:
        return "`method` is made for grey images." if getattr(model, "grey", False) else None


MODELS: dict[str, Callable[[], Any]] = {
    "relpos": lambda: disturb(VisionTransformerRelPos(**SMALL, class_token=True, global_pool="token")),
    "eva": lambda: disturb(Eva(**SMALL, use_rot_pos_emb=True, use_abs_pos_emb=True, global_pool="token")),
    "torchvision": build_tv,
    "ViTForImageClassification": lambda: build_hf("ViTForImageClassification"),
    "DINOv3ViTModel": lambda: build_hf("DINOv3ViTModel"),
}


@torch.no_grad()
def run(model: Any, images: Tensor) -> Tensor:
    result = model(images)
    return result if isinstance(result, Tensor) else outputs_of(result)


def images_of_other_lengths() -> Tensor:
    images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    images[1] += 0.2
    images[2] -= 0.15
    return images


@pytest.mark.parametrize("name", MODELS)
def test_padding_has_no_effect(name: str) -> None:
    model, images = MODELS[name]().double(), images_of_other_lengths()
    lengths = {int((F.avg_pool2d(i.mean(0, keepdim=True), 4) > 0).sum()) for i in images}
    assert len(lengths) == 3
    dense = run(model, images)
    with lp.patch(model, Bright()):
        together = run(model, images)
        alone = torch.cat([run(model, image[None]) for image in images])
    assert (together - alone).abs().max() < 1e-10
    assert (together - dense).abs().max() > 1e-3
    assert torch.equal(run(model, images), dense)


def test_an_image_matches_a_run_without_the_others(build: Any) -> None:
    """The output of the dense blocks for the bright patches of an image only."""
    model, images = build().double(), images_of_other_lengths()
    expected = []
    for image in images:
        reference = copy.deepcopy(model)
        bright = (F.avg_pool2d(image.mean(0, keepdim=True), 4) > 0).flatten().nonzero()[:, 0] + 1
        index = torch.cat((torch.zeros(1, dtype=torch.int64), bright))
        reference.blocks[0].register_forward_pre_hook(lambda block, args, index=index: (args[0][:, index],))
        expected.append(run(reference, image[None]))
    with lp.patch(model, Bright()):
        assert (run(model, images) - torch.cat(expected)).abs().max() < 1e-10
    trace = trace_tokens(model, images, Bright())
    assert trace.tokens.tolist() == [1 + int((F.avg_pool2d(i.mean(0, keepdim=True), 4) > 0).sum()) for i in images]


def test_copies_pickles_and_updates(build: Any) -> None:
    model, images = build().double(), images_of_other_lengths()
    handle = lp.patch(model, Bright())
    expected = run(model, images)
    assert handle.schedule is None
    assert torch.equal(run(copy.deepcopy(model), images), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), images), expected)
    handle.update()
    assert torch.equal(run(model, images), expected)
    handle.remove()


def test_a_schedule_is_rejected_for_adaptive_methods(build: Any) -> None:
    with pytest.raises(ScheduleError, match=r"`schedule` must be left out with bright, .* got \[5, 0, 0, 0\]"):
        lp.patch(build(), Bright(), [5, 0, 0, 0])
    with pytest.raises(ScheduleError, match="`schedule` must say how many tokens pomt removes, got None"):
        lp.patch(build(), "pomt")


def test_unsupported_models_are_rejected(build: Any) -> None:
    model = build()
    model.grey = True
    with pytest.raises(ArgumentError, match="made for grey images"):
        lp.patch(model, Bright())
    assert not find_vision_transformer(model).root.blocks[0].__dict__.get("_prune_patch")


def test_pooling_models_are_rejected(build: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"bright pads .* pools over its patch tokens"):
        lp.patch(build("pool-avg"), Bright())
