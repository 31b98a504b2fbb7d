import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models import vision_transformer as vit
from torch import Tensor, nn

import lightning_prune as lp
from helpers import reference as naive
from lightning_prune.patching.attention_capture import RecordingMask, SDPARecorder, stack_heads
from lightning_prune.patching.models.timm_vit import TimmVisionTransformer
from lightning_prune.reduction import AttentionInputs
from lightning_prune.reduction.functional import attention_probabilities

pytestmark = pytest.mark.usefixtures("no_mode_left")
B, H, N, D = 2, 2, 6, 4
attend: Any = F.scaled_dot_product_attention  # which a type checker lets take no mask that is no tensor


def parts() -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, B, H, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return query, key, value


class OwnAttention(nn.Module):
    """Attention without `scaled_dot_product_attention`."""

    def __init__(self, dim: int, num_heads: int, **_: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), num_heads

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, channels = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        output: Tensor = self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, channels))
        return output


def test_recording_keeps_the_output_bit_identical() -> None:
    query, key, value = parts()
    mask = torch.randn(N, N, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    calls: list[AttentionInputs] = []
    with SDPARecorder(calls):
        found = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
        assert torch.equal(F.relu(query), query.clamp(min=0)), "other functions pass through"
    assert torch.equal(found, expected)
    assert len(calls) == 1
    assert calls[0].query is query
    assert calls[0].key is key
    assert calls[0].value is value
    assert calls[0].mask is mask
    assert calls[0].scale == 0.3


def test_all_call_signatures_are_recorded() -> None:
    query, key, value = parts()
    calls: list[AttentionInputs] = []
    with SDPARecorder(calls):
        F.scaled_dot_product_attention(query, key, value, None, 0.0, False)
        F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=None)
    assert [call[:5] for call in calls] == [(query, key, value, None, None)] * 2


@pytest.mark.parametrize("kind", ["none", "additive", "bool"])
def test_log_sizes_are_added_to_the_logits(kind: str) -> None:
    """Adding log(s) to the logit of a key is equivalent to s copies of that key."""
    query, key, value = parts()
    sizes = torch.tensor([[1, 2, 1, 3, 1, 1], [4, 1, 1, 1, 1, 2]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    mask = {
        "none": None,
        "additive": torch.randn(B, H, N, N, generator=generator, dtype=torch.float64),
        "bool": torch.eye(N, dtype=torch.bool) | (torch.rand(B, H, N, N, generator=generator) > 0.3),
    }[kind]
    calls: list[AttentionInputs] = []
    with SDPARecorder(calls, sizes.log()[:, None, None]):
        found = F.scaled_dot_product_attention(query, key, value, mask)
    for b in range(B):
        index = [i for i in range(N) for _ in range(int(sizes[b, i]))]
        copies = [None if mask is None else mask[b][..., index]]
        expected = F.scaled_dot_product_attention(query[b], key[b][:, index], value[b][:, index], *copies)
        torch.testing.assert_close(found[b], expected, rtol=1e-10, atol=1e-12)
        assert calls[0].mask is not None
        seen = calls[0].mask.expand(B, H, N, N)[b]
        weights = torch.tensor(naive.probabilities(query[b], key[b], mask=seen), dtype=torch.float64)
        torch.testing.assert_close(weights @ value[b], expected, rtol=1e-10, atol=1e-12)


def test_causal_attention_is_rejected() -> None:
    message = r"needs bidirectional attention, got causal attention"
    with pytest.raises(lp.UnsupportedModelError, match=message), SDPARecorder([]):
        F.scaled_dot_product_attention(*parts(), is_causal=True)
    with pytest.raises(lp.UnsupportedModelError, match=message):
        attend(*parts(), attn_mask=RecordingMask([], None), is_causal=True)


class TestRecordingMask:
    @pytest.mark.parametrize("supports_key_bias", [True, False])
    @pytest.mark.parametrize("by_name", [True, False])
    def test_a_recording_mask_matches_a_recorder(self, supports_key_bias: bool, by_name: bool) -> None:
        query, key, value = parts()
        log_sizes = torch.rand(B, 1, 1, N, dtype=torch.float64) if supports_key_bias else None
        calls: list[AttentionInputs] = []
        mask = RecordingMask(calls, log_sizes)
        found = attend(query, key, value, attn_mask=mask, scale=0.3) if by_name else attend(query, key, value, mask)
        with SDPARecorder(calls, log_sizes):
            expected = attend(query, key, value, scale=0.3 if by_name else None)
        assert torch.equal(found, expected)
        assert all(one is other for one, other in zip(calls[0][:3], (query, key, value), strict=True))
        if calls[0].mask is not None and calls[1].mask is not None:
            assert torch.equal(calls[0].mask, calls[1].mask)
        assert (calls[0].mask is not None) is (calls[1].mask is not None) is supports_key_bias
        assert calls[0].scale == calls[1].scale

    def test_a_recording_mask_is_rejected_by_other_functions(self, build: Any, images: Tensor) -> None:
        message = r"does not call torch\.nn\.functional\.scaled_dot_product_attention"
        mask: Any = RecordingMask([], None)
        with pytest.raises(lp.UnsupportedModelError, match=message):
            attend(mask, *parts()[1:])
        with pytest.raises(lp.UnsupportedModelError, match=message):
            torch.where(torch.ones(N, N, dtype=torch.bool), mask, 0.0)
        model = build()
        lp.patch(model, "tome", [5, 0, 7, 0])
        model.blocks[2].attn.fused_attn = False
        with pytest.raises(lp.UnsupportedModelError, match=message):
            model(images)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["vit", "res-post", "qk-norm", "parallel-things"])
    def test_a_recording_mask_keeps_the_output_bit_identical(
        self, build: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        model = build(name)
        with lp.patch(model, "tome", [5, 0, 7, 0]):
            found = model(images)
        monkeypatch.setattr(TimmVisionTransformer, "mask_passthrough", lambda *_: None)
        with lp.patch(model, "tome", [5, 0, 7, 0]):
            assert torch.equal(model(images), found)

    @torch.no_grad()
    def test_a_recording_mask_is_not_used_with_unknown_attention(self, build: Any, images: Tensor) -> None:
        """A replaced forward may use a mask in any way, so a recorder is used instead."""

        class Deaf(vit.Attention):
            def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
                return super().forward(x)

        model, plain = build(), build()
        for block in model.blocks:
            block.attn.__class__ = Deaf
        with lp.patch(model, "tome", [5, 0, 7, 0]), lp.patch(plain, "tome", [5, 0, 7, 0]):
            expected = plain(images)
            assert torch.equal(model(images), expected)
            for block in plain.blocks[2:]:
                block.attn.__class__ = Deaf
            assert torch.equal(plain(images), expected)

    @torch.no_grad()
    @pytest.mark.parametrize("everywhere", [True, False])
    def test_a_recording_mask_is_not_used_with_a_replaced_forward(
        self, build: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch, everywhere: bool
    ) -> None:
        """On one module, or on timm's class before or after patching."""
        model = build()
        own = vit.Attention.forward
        with lp.patch(model, "tome", [5, 0, 7, 0]):
            expected = model(images)
            if everywhere:
                monkeypatch.setattr(vit.Attention, "forward", lambda self, x, attn_mask=None, **_: own(self, x))
            for block in [] if everywhere else model.blocks[1:]:
                block.attn.forward = lambda x, attn_mask=None, attn=block.attn, **_: own(attn, x)
            assert torch.equal(model(images), expected)
        if everywhere:
            with lp.patch(model, "tome", [5, 0, 7, 0]):
                assert torch.equal(model(images), expected)


def test_heads_of_several_calls_are_concatenated() -> None:
    one = AttentionInputs(*parts())
    other = AttentionInputs(*(part + 1 for part in parts()))
    assert stack_heads([one]) is one
    both = stack_heads([one, other])
    assert both.query.shape == (B, 2 * H, N, D)
    assert torch.equal(both.key, torch.cat((one.key, other.key), dim=1))


@pytest.mark.parametrize("shape", [(N, N), (1, H, N, N), (B, 1, 1, N)])
def test_masks_of_several_calls_are_concatenated(shape: tuple[int, ...]) -> None:
    """As in a block with several attention modules that weights its keys and reduces again."""
    one = AttentionInputs(*parts(), torch.randn(shape).double())
    other = AttentionInputs(*(part + 1 for part in parts()), torch.randn(shape).double())
    both = attention_probabilities(stack_heads([one, other]))
    assert torch.equal(both, torch.cat((attention_probabilities(one), attention_probabilities(other)), dim=1))


@pytest.mark.parametrize("change", [{"mask": torch.zeros(N, N)}, {"scale": 0.1}, {"query": torch.zeros(B, H, 1, D)}])
def test_calls_of_different_shapes_are_rejected(change: dict[str, Any]) -> None:
    one = AttentionInputs(*parts())
    with pytest.raises(lp.UnsupportedModelError, match="several attention calls of different shapes"):
        stack_heads([one, one._replace(**change)])


def own_attention(build: Any) -> vit.VisionTransformer:
    model: vit.VisionTransformer = build("vit")
    for block in model.blocks:
        block.attn = OwnAttention(32, 4).eval()
    return model


def test_unknown_attention_cannot_be_read(build: Any, images: Tensor) -> None:
    model = own_attention(build)
    message = r"does not call torch\.nn\.functional\.scaled_dot_product_attention"
    with lp.patch(model, "pomt", [0, 6, 0, 0]), pytest.raises(lp.UnsupportedModelError, match=message):
        model(images)


def test_unknown_attention_can_be_pruned_at_random(build: Any, images: Tensor, leaving: Any) -> None:
    with lp.patch(own_attention(build), "random", [0, 6, 0, 0]) as handle:
        assert leaving(handle.transformer.root, images) == (26, 20, 20, 20)


class TestNoModeIsLeftActive:
    """After an error in one model, other models are unaffected and not recorded."""

    def fails(self, model: nn.Module, images: Tensor, other: nn.Module) -> None:
        with torch.no_grad():
            before = other(images)
            with pytest.raises(RuntimeError):
                model(images)
            assert torch.overrides._get_current_function_mode_stack() == []
            assert torch.equal(other(images), before)

    @pytest.mark.parametrize("inside", ["norm1", "attn", "mlp"])
    @pytest.mark.parametrize("block", [1, 2])
    def test_a_raising_hook_leaves_no_recorder(self, build: Any, images: Tensor, inside: str, block: int) -> None:
        def stop(*_: Any) -> None:
            raise RuntimeError("stop")

        model, other = build(), build()
        handle = lp.patch(model, "pomt", [0, 6, 5, 0])
        hook = getattr(model.blocks[block], inside).register_forward_hook(stop)
        self.fails(model, images, other)
        hook.remove()
        with torch.no_grad():
            pruned = model(images)
            handle.remove()
            with lp.patch(other, "pomt", [0, 6, 5, 0]):
                assert torch.equal(pruned, other(images))

    def test_raising_attention_leaves_no_recorder(self, build: Any, images: Tensor) -> None:
        model, other = build(), build()
        lp.patch(model, "pomt", [0, 6, 5, 0])
        model.blocks[1].attn.qkv = nn.Linear(32, 97)
        self.fails(model, images, other)

    def test_a_raising_reduction_leaves_no_recorder(self, build: Any, images: Tensor) -> None:
        class Broken(lp.reduction.POMT):
            def reduce(self, sequence: Any, remove: int) -> Any:
                raise RuntimeError("stop")

        model, other = build(), build()
        lp.patch(model, Broken(), [0, 6, 5, 0])
        self.fails(model, images, other)

    @pytest.mark.parametrize(("fits", "inside"), [(True, [0, 0, 0, 0]), (False, [0, 1, 0, 0])])
    def test_other_blocks_are_not_recorded(
        self, build: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch, fits: bool, inside: list[int]
    ) -> None:
        """Reducing blocks use no mode if a recording mask can be used."""
        model, depths, masks = build(), [], []

        def look(_: Any, args: Any, kwargs: Any) -> None:
            depths.append(len(torch.overrides._get_current_function_mode_stack()))
            masks.append(isinstance(kwargs.get("attn_mask"), RecordingMask))

        for block in model.blocks:
            block.attn.register_forward_pre_hook(look, with_kwargs=True)
        if not fits:
            monkeypatch.setattr(TimmVisionTransformer, "mask_passthrough", lambda *_: None)
        with lp.patch(model, "pomt", [0, 6, 0, 0]):
            depths.clear()
            masks.clear()
            model(images)
        assert depths == inside
        assert masks == [False, fits, False, False]

    def test_blocks_that_only_weight_keys_receive_a_mask(
        self, build: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The mask holds numbers that the attention adds itself, with the same result as with a recorder."""
        model, masks = build(), []

        def look(_: Any, args: Any, kwargs: Any) -> None:
            depth = len(torch.overrides._get_current_function_mode_stack())
            masks.append((type(kwargs.get("attn_mask")), depth))

        for block in model.blocks:
            block.attn.register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            with lp.patch(model, "tome", [5, 0, 7, 0]):
                masks.clear()
                expected = model(images)
                assert masks == [(RecordingMask, 0), (Tensor, 0), (RecordingMask, 0), (Tensor, 0)]
                model.blocks[1].attn.fused_attn = model.blocks[3].attn.fused_attn = False
                torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
                model.blocks[1].attn.fused_attn = model.blocks[3].attn.fused_attn = True
            monkeypatch.setattr(TimmVisionTransformer, "mask_passthrough", lambda *_: None)
            with lp.patch(model, "tome", [5, 0, 7, 0]):
                masks.clear()
                assert torch.equal(model(images), expected)
                assert masks == [(type(None), 1)] * 4

    def test_a_function_mode_of_the_user_stays_active(self, build: Any, images: Tensor) -> None:
        class Counting(torch.overrides.TorchFunctionMode):
            seen = 0

            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.seen += func is F.scaled_dot_product_attention
                return func(*args, **(kwargs or {}))

        model = build()
        plain = copy.deepcopy(model)
        with lp.patch(model, "pomt", [0, 6, 5, 0]), lp.patch(plain, "pomt", [0, 6, 5, 0]), torch.no_grad():
            with Counting() as counting:
                found = model(images)
            assert counting.seen == 4
            assert torch.equal(found, plain(images))
