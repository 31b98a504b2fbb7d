"""Sizes, positions, pixels and gradients in patched blocks."""

import copy
import gc
import math
import weakref
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune.patching.patched_block import patch_key
from lightning_prune.patching.token_state import TokenState, get_state
from lightning_prune.reduction import POMT, RandomDrop, Reduction, ReductionOutput, TokenSequence, TopK

from .by_hand import Pairs

DEPTH = 4


class Variance(Reduction):
    """Keeps the patches with the largest pixel variance before block 0, as VWT does."""

    name: ClassVar[str] = "variance"
    site = "input"
    reads: ClassVar[frozenset[str]] = frozenset({"pixels"})

    def __init__(self, patch_size: int = 4) -> None:
        self.patch_size = patch_size

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        assert sequence.pixels is not None
        assert sequence.attention is None
        patches = F.unfold(sequence.pixels, self.patch_size, stride=self.patch_size)
        keep = patches.shape[-1] - remove
        index = patches.var(dim=1).topk(keep).indices.sort().values + sequence.num_prefix_tokens
        prefix = torch.arange(sequence.num_prefix_tokens).expand(len(index), -1)
        index = torch.cat((prefix, index), 1)
        return ReductionOutput(
            sequence.tokens.gather(1, index[..., None].expand(-1, -1, sequence.tokens.shape[-1])), index
        )

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return tokens - num_prefix_tokens - 1


class RecordingReduction(Reduction):
    """Wraps a reduction and records its inputs and outputs."""

    name: ClassVar[str] = "watching"
    seen: ClassVar[list[tuple[TokenSequence, ReductionOutput]]] = []

    def __init__(self, other: Reduction) -> None:
        self.other = other
        self.site, self.proportional_attention = other.site, other.proportional_attention
        self.reads, self.tracks_sizes = other.reads, other.tracks_sizes

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        reduced = self.other.reduce(sequence, remove)
        self.seen.append((sequence, reduced))
        return reduced

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return self.other.max_removed(tokens, num_prefix_tokens)


@pytest.fixture(autouse=True)
def forget() -> None:
    RecordingReduction.seen.clear()


def merged_by_hand(model: Any, images: Tensor, removed: list[int], proportional: bool) -> Tensor:
    """One image at a time, attention as a plain softmax in which log(size) is added to the logit of each key."""
    outputs, prefix = [], model.num_prefix_tokens
    for image in images:
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
        sizes = [1.0] * len(x)
        for block, remove in zip(model.blocks, removed, strict=True):
            query, key, value = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, 4, -1).permute(1, 2, 0, 3)
            logits = block.attn.q_norm(query) @ block.attn.k_norm(key).transpose(-2, -1) / query.shape[-1] ** 0.5
            if proportional:
                logits = logits + torch.tensor([math.log(size) for size in sizes], dtype=x.dtype)
            mixed = (logits.softmax(-1) @ value).transpose(0, 1).reshape(len(x), -1)
            x = x + block.ls1(block.attn.proj(mixed))
            rows, weights = list(x[:prefix]), sizes[:prefix]
            for pair in range(remove):
                i = prefix + 2 * pair
                weight = sizes[i] + sizes[i + 1]
                rows.append((x[i] * sizes[i] + x[i + 1] * sizes[i + 1]) / weight)
                weights.append(weight)
            x, sizes = torch.stack([*rows, *x[prefix + 2 * remove :]]), weights + sizes[prefix + 2 * remove :]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        outputs.append(model.forward_head(model.norm(x[None])))
    return torch.cat(outputs)


class TestSizes:
    @pytest.mark.parametrize("proportional", [True, False])
    @pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip", "qk-norm"])
    @pytest.mark.parametrize("removed", [[0, 5, 0, 0], [7, 0, 6, 0], [3, 3, 3, 3]], ids=["one", "two", "all"])
    def test_sizes_weight_every_later_block(
        self, build: Any, images: Tensor, relative_error: Any, name: str, removed: list[int], proportional: bool
    ) -> None:
        model, images = build(name).double(), images.double()
        with torch.no_grad():
            expected = merged_by_hand(model, images, removed, proportional)
            dense = model(images)
            with lp.patch(model, Pairs(proportional), removed):
                assert relative_error(model(images), expected) < 1e-10
                assert relative_error(model(images), expected) < 1e-10, "nothing is left of the pass before"
            assert torch.equal(model(images), dense)

    def test_without_fused_attention(self, build: Any, images: Tensor, relative_error: Any) -> None:
        """Blocks that only weight their keys are recorded too, so they also need fused attention."""
        model, images = build().double(), images.double()
        for block in model.blocks:
            block.attn.fused_attn = False
        with torch.no_grad():
            expected = merged_by_hand(model, images, [0, 5, 0, 0], True)
            with lp.patch(model, Pairs(), [0, 5, 0, 0]):
                assert relative_error(model(images), expected) < 1e-10
        assert not any(block.attn.fused_attn for block in model.blocks)

    def test_the_next_reduction_receives_the_sizes(self, build: Any, images: Tensor) -> None:
        for proportional in (True, False):
            RecordingReduction.seen.clear()
            with lp.patch(build(), RecordingReduction(Pairs(proportional)), [5, 0, 6, 0]) as handle:
                handle.transformer.root(images)
            (first, _), (second, reduced) = RecordingReduction.seen
            assert first.sizes is None
            assert second.sizes is not None
            assert second.sizes[0].tolist() == [1, *[2] * 5, *[1] * 15]
            assert reduced.sizes is not None
            assert reduced.sizes[0].tolist() == [1, 4, 4, 3, 2, 2, 2, *[1] * 8]

    def test_batches_of_different_sizes_alternate(self, build: Any, draw: Any, relative_error: Any) -> None:
        model = build("dynamic-size").double()
        with lp.patch(model, Pairs(), [5, 0, 6, 0]), torch.no_grad():
            for batch, size in ((2, 20), (3, 28), (1, 20)):
                images = draw(batch, size).double()
                assert relative_error(model(images), merged_by_hand(model, images, [5, 0, 6, 0], True)) < 1e-10

    @pytest.mark.parametrize("removed", [[0, 5, 0, 0], [7, 0, 6, 0]])
    def test_compile(self, build: Any, images: Tensor, removed: list[int]) -> None:
        torch._dynamo.reset()
        model = build()
        lp.patch(model, Pairs(), removed)
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1

    def test_export_and_copies_after_it(self, build: Any, images: Tensor) -> None:
        model = build()
        lp.patch(model, Pairs(), [7, 0, 6, 0])
        with torch.no_grad():
            expected = model(images)
            exported = torch.export.export(model, (images,))
            torch.testing.assert_close(exported.module()(images), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(model(images), expected)
            assert torch.equal(copy.deepcopy(model)(images), expected)


class TestPositions:
    @pytest.mark.parametrize("method", [Pairs(), POMT(), RandomDrop(4)], ids=repr)
    def test_sources_are_composed_over_two_reductions(self, build: Any, images: Tensor, method: Reduction) -> None:
        """Positions in block 0, by tracing each token's index through the outputs of the reductions."""
        watching = RecordingReduction(method)
        watching.proportional_attention = watching.tracks_sizes = True  # the account is kept for all blocks
        transformer = replace(
            lp.patching.find_vision_transformer(build()), has_position_inputs=True
        )  # some block asks for them
        left: list[Any] = []
        transformer.root.norm.register_forward_pre_hook(lambda _, args: left.append(get_state(args[0])))
        handle = lp.PatchHandle(transformer, watching, [5, 0, 6, 0])
        transformer.root(images)
        positions = [list(range(26)) for _ in images]
        for _, reduced in RecordingReduction.seen:
            for b, row in enumerate(reduced.positions.tolist()):
                positions[b] = [-1 if i < 0 else positions[b][i] for i in row]
        assert left[0].token_state.positions.tolist() == positions
        assert len(positions[0]) == 15
        handle.remove()

    def test_an_adapter_receives_the_state(self, build: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        """`ModelAdapter.adapt_position_inputs` selects the rotary embedding in every later block."""
        transformer = replace(lp.patching.find_vision_transformer(build()), has_position_inputs=True)
        carried: list[list[int]] = []

        def carry(self: Any, args: Any, kwargs: Any, arrived: TokenState, num_prefix_tokens: int) -> Any:
            carried.append(arrived.positions[0].tolist())
            assert num_prefix_tokens == 1
            return args, kwargs

        monkeypatch.setattr(type(transformer.adapter), "adapt_position_inputs", carry)
        with lp.PatchHandle(transformer, RecordingReduction(RandomDrop()), [0, 5, 6, 0]):
            transformer.root(images)
        first, second = (reduced.positions[0].tolist() for _, reduced in RecordingReduction.seen)
        assert carried == [first, [first[i] for i in second]]


class TestReductionInputs:
    @pytest.mark.parametrize(("name", "prefix", "cls"), [("vit", 1, True), ("registers-without-class", 4, False)])
    def test_the_tokens(self, build: Any, images: Tensor, name: str, prefix: int, cls: bool) -> None:
        model, seen = build(name), {}
        model.blocks[1].register_forward_pre_hook(lambda module, args: seen.update(entering=args[0]))
        with lp.patch(model, RecordingReduction(POMT()), [0, 5, 0, 0]), torch.no_grad():
            model(images)
        ((sequence, _),) = RecordingReduction.seen
        block, x = model.blocks[1], seen["entering"]
        assert sequence.num_prefix_tokens == prefix
        assert sequence.has_class_token is cls
        assert sequence.entering is x
        with torch.no_grad():
            assert torch.equal(sequence.tokens, x + block.ls1(block.attn(block.norm1(x))))
        assert sequence.attention is not None
        assert sequence.attention.query.shape == (2, 4, 25 + prefix, 8)
        assert sequence.pixels is None

    def test_attention_only_if_it_is_read(self, build: Any, images: Tensor) -> None:
        with lp.patch(build(), RecordingReduction(RandomDrop()), [0, 5, 0, 0]) as handle:
            handle.transformer.root(images)
        assert RecordingReduction.seen[0][0].attention is None


class TestPixels:
    def expected(self, model: Any, images: Tensor, remove: int) -> Tensor:
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        left = []
        for image, tokens in zip(images, x, strict=True):
            spread = [image[:, r : r + 4, c : c + 4].var().item() for r in range(0, 20, 4) for c in range(0, 20, 4)]
            kept = sorted(sorted(range(25), key=lambda i: spread[i], reverse=True)[: 25 - remove])
            prefix = model.num_prefix_tokens
            left.append(tokens[[*range(prefix), *(prefix + i for i in kept)]])
        output: Tensor = model.forward_head(model.norm(model.blocks(torch.stack(left))))
        return output

    @pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip"])
    def test_a_reduction_before_block_0_receives_the_images(
        self, build: Any, images: Tensor, relative_error: Any, leaving: Any, name: str
    ) -> None:
        model, images = build(name).double(), images.double()
        with torch.no_grad():
            expected, dense = self.expected(model, images, 9), model(images)
            with lp.patch(model, Variance(), [9, 0, 0, 0]):
                assert relative_error(model(images), expected) < 1e-10
                assert leaving(model, images)[0] == 16 + model.num_prefix_tokens
            assert torch.equal(model(images), dense)
        assert "_prune_patch" not in model.patch_embed.__dict__

    def test_images_are_freed_after_the_forward_pass(self, build: Any, draw: Any) -> None:
        with lp.patch(build(), Variance(), [9, 0, 0, 0]) as handle, torch.no_grad():
            images = draw()
            handle.transformer.root(images)
            alive = weakref.ref(images)
            del images
            gc.collect()
            assert alive() is None

    def test_copies(self, build: Any, images: Tensor) -> None:
        model = build()
        lp.patch(model, Variance(), [9, 0, 0, 0])
        other = copy.deepcopy(model)
        assert torch.equal(other(images), model(images))
        assert other.patch_embed._prune_patch is other.blocks[0]._prune_patch.pixels
        assert other.patch_embed._prune_patch is not model.patch_embed._prune_patch

    def test_compile_and_export(self, build: Any, images: Tensor) -> None:
        torch._dynamo.reset()
        model = build()
        lp.patch(model, Variance(), [9, 0, 0, 0])
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with torch.no_grad():
            expected = model(images)
            for _ in range(3):
                torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=1e-5)
            exported = torch.export.export(model, (images,)).module()
            torch.testing.assert_close(exported(images), expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1

    def test_another_block_is_rejected(self, build: Any) -> None:
        with pytest.raises(lp.ScheduleError, match=r"`schedule` must .* before which variance acts, got block 1"):
            lp.patch(build(), Variance(), [9, 3, 0, 0])


class TestGradients:
    @pytest.mark.parametrize("name", ["vit", "layer-scale", "parallel-things"])
    @pytest.mark.parametrize("method", [POMT(), RandomDrop(), RandomDrop(1, "input"), Pairs(), Variance()], ids=repr)
    @pytest.mark.parametrize("training", [True, False])
    def test_checkpointing_gives_the_same(
        self, build: Any, images: Tensor, name: str, method: Reduction, training: bool
    ) -> None:
        """A checkpointed block runs again during backward, after all other blocks."""
        model = build(name).train(training)
        removed = [5, 0, 0, 0] if method.site == "input" else [5, 0, 6, 0]
        gradients = []
        with lp.patch(model, method, removed):
            for checkpointing in (False, True):
                model.set_grad_checkpointing(checkpointing)
                model.zero_grad()
                F.cross_entropy(model(images), torch.tensor([1, 4])).backward()
                gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-7, msg=key)

    def test_the_gradient_is_that_of_the_function(self, build: Any, draw: Any) -> None:
        """Through kept, fused and dropped tokens: the directional derivative agrees with finite differences."""
        model, images = build().double(), draw().double()
        direction = draw(seed=5).double()
        with lp.patch(model, "pomt", [0, 6, 5, 0]):
            images.requires_grad_()
            (gradient,) = torch.autograd.grad(model(images).square().sum(), images)
            step = 1e-6
            with torch.no_grad():
                ahead, behind = (model(images + s * direction).square().sum() for s in (step, -step))
        assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-6)


class Hiding(TopK):
    """Its settings name a file, say, and not what was in it."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def settings(self) -> dict[str, Any]:
        return {"held": "a file"}


@pytest.mark.parametrize(("one", "other"), [((1, 2), (1, 3)), ([1, 2], [1, 3])])  # a list cannot be hashed
def test_patches_by_other_methods_have_other_keys_whatever_their_settings_say(one: Any, other: Any) -> None:
    model, keys = tiny_vit(), []
    for held in (one, other, one):
        with lp.patch(model, Hiding(held), [0, 4, 0, 0]):
            keys.append(patch_key(model))
    assert keys[0] == keys[2] != keys[1]
    assert len({*keys, patch_key(model)}) == 3
