"""Reasons for unsupported models, and for blocks that cannot reduce."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import swin_t

import lightning_prune as lp
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.attention_capture import CapturedAttention
from lightning_prune.reduction import POMT, RandomDrop, ReductionOutput, TokenSequence

AFTER = "reshapes its tokens to their grid after the blocks"
INSIDE = "blocks operate on the grid of tokens"
STAGES = "is hierarchical: its stages pool or merge the grid of tokens"
REASONS = {
    "xcit_nano_12_p16_224": INSIDE,
    "volo_d1_224": INSIDE,
    "samvit_base_patch16_224": INSIDE,
    "tnt_s_patch16_224": "blocks have more than one sequence of tokens",
    "swin_tiny_patch4_window7_224": STAGES,
    "swinv2_tiny_window8_256": STAGES,
    "levit_128": STAGES,
    "hiera_tiny_224": STAGES,
    "pvt_v2_b0": STAGES,
    "twins_svt_small": STAGES,
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_of_timm_models(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(
        lp.UnsupportedModelError, match=rf"^{type(model).__name__} cannot be pruned: it.? {REASONS[name]}"
    ):
        lp.patch(model, "pomt", [1] * 12)
    with pytest.raises(lp.UnsupportedModelError, match=rf"{type(model).__name__} at '1' cannot be pruned: "):
        lp.patch(nn.Sequential(nn.Identity(), model), "pomt", [1] * 12)


@pytest.mark.parametrize("name", timm.list_models(["*qwen3*", "*deepseek*", "gemma4*"]))
def test_reasons_of_recent_timm_models(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(lp.UnsupportedModelError, match=rf"{AFTER}\. Pass `restore='auto'`"):
        lp.patch(model, "pomt", [1] * 12)


def test_reasons_of_torchvision_models() -> None:
    with (
        torch.device("meta"),
        pytest.raises(lp.UnsupportedModelError, match=f"SwinTransformer cannot be pruned: it {STAGES}"),
    ):
        lp.patch(swin_t(), "pomt", [1] * 12)


def test_an_unsupported_model_next_to_a_supported_one(build: Any) -> None:
    with torch.device("meta"):
        other = timm.create_model("swin_tiny_patch4_window7_224")
    model = build()
    assert find_vision_transformer(nn.ModuleDict({"a": other, "b": model})).root is model


class TestConVit:
    @pytest.fixture
    def model(self) -> nn.Module:
        return timm.create_model(
            "convit_tiny", depth=4, local_up_to_layer=2, img_size=80, embed_dim=32, num_heads=4
        ).eval()

    @pytest.mark.parametrize("removed", [[3, 0, 0, 0], [0, 3, 3, 0]])
    def test_the_first_blocks_of_convit_are_rejected(self, model: nn.Module, removed: list[int]) -> None:
        message = (
            rf"`schedule` must remove tokens from block 2 on .* got block {0 if removed[0] else 1}: "
            "earlier blocks attend by position on the whole grid"
        )
        with pytest.raises(lp.ScheduleError, match=message):
            lp.patch(model, "pomt", removed)
        with pytest.raises(lp.ScheduleError, match=message):
            lp.patch(model, "pomt", lp.KeepRates([1 - 0.1 * (r > 0) for r in removed]))

    def test_reductions_before_block_0_of_convit_are_rejected(self, model: nn.Module) -> None:
        with pytest.raises(lp.ScheduleError, match="in this ConVit, got block 0"):
            lp.patch(model, RandomDrop(site="input"), [3, 0, 0, 0])

    def test_profile_and_plan(self, model: nn.Module) -> None:
        """The token curve is measured at the first block that can reduce."""
        images = torch.randn(4, 3, 80, 80)
        plan = lp.plan(model, images, calibration=images, methods="topk", time_limit=1, verbose=False)
        assert all(block >= 2 for block in plan.schedule.reducing)
        assert (plan.profile.dense_tokens, plan.profile.block) == (26, 2)
        with pytest.raises(lp.ScheduleError, match="in this ConVit, got block 1"):
            lp.profile_latency(model, images, method="pomt", block=1, time_limit=1, verbose=False)


class Weighing(POMT):
    """A method with proportional attention."""

    proportional_attention = True

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        reduced = super().reduce(sequence, remove)
        sizes = torch.ones_like(reduced.positions, dtype=reduced.tokens.dtype)
        return ReductionOutput(reduced.tokens, reduced.positions, sizes)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny"])
def test_attention_without_key_bias_is_rejected(name: str) -> None:
    more = {"local_up_to_layer": 2} if name == "convit_tiny" else {}
    model = timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80, **more).eval()
    with pytest.raises(lp.UnsupportedModelError, match="pomt weights the attention of later blocks by token sizes"):
        lp.patch(model, Weighing(), [0, 0, 0, 3])
    assert not any(isinstance(module, CapturedAttention) for module in model.modules())


class TestNaFlex:
    @pytest.fixture
    def model(self) -> nn.Module:
        return timm.create_model("naflexvit_base_patch16_gap", depth=4, embed_dim=32, num_heads=4).eval()

    def test_padded_batches_are_rejected(self, model: nn.Module) -> None:
        patches = torch.randn(1, 9, 768)
        places = torch.cartesian_prod(torch.arange(3), torch.arange(3))[None]
        batch = {"patches": patches, "patch_coord": places, "patch_valid": torch.ones(1, 9, dtype=torch.bool)}
        dense = model(batch)
        with lp.patch(model, "pomt", [0, 3, 0, 0]):
            for call in (lambda: model(batch), lambda: model(patches, places, batch["patch_valid"])):
                with pytest.raises(lp.UnsupportedModelError, match=r"must be images .*, got patches"):
                    call()
        assert torch.equal(model(batch), dense)

    def test_any_image_size(self, model: nn.Module, leaving: Any) -> None:
        with lp.patch(model, "pomt", lp.KeepRates([1, 0.5, 1, 1])):
            prefix = model.num_prefix_tokens
            assert leaving(model, torch.randn(1, 3, 64, 96)) == (24 + prefix, *[12 + prefix] * 3)
            assert leaving(model, torch.randn(1, 3, 80, 80)) == (25 + prefix, *[13 + prefix] * 3)


def test_causal_attention(build: Any, images: Tensor) -> None:
    for name in ("vit", "parallel-things"):
        model = build(name)
        with (
            lp.patch(model, "pomt", [0, 3, 0, 0]),
            pytest.raises(lp.UnsupportedModelError, match="needs bidirectional attention"),
        ):
            model.blocks[1](torch.randn(1, 26, 32), is_causal=True)
