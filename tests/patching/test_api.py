import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import unpatch
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.reduction import POMT, RandomDrop

REMOVED = [0, 6, 5, 0]


def state(model: nn.Module) -> Callable[[], None]:
    """Records everything that a patch could change; the result asserts that nothing has changed."""
    modules = list(model.modules())
    classes = [type(m) for m in modules]
    keys = [list(m.__dict__) for m in modules]
    flags = [(m.training, getattr(m, "fused_attn", None)) for m in modules]
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    generator = torch.get_rng_state()

    def unchanged() -> None:
        assert list(model.modules()) == modules
        assert [type(m) for m in modules] == classes
        assert [list(m.__dict__) for m in modules] == keys
        assert [(m.training, getattr(m, "fused_attn", None)) for m in modules] == flags
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(tensors)
        for name, (tensor, bits) in tensors.items():
            assert now[name] is tensor
            assert torch.equal(tensor, bits)
        assert torch.equal(torch.get_rng_state(), generator)

    return unchanged


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = model(images)
    return output


@pytest.mark.parametrize("method", ["pomt", "random"])
def test_an_empty_schedule_changes_nothing(build: Any, configuration: str, images: Tensor, method: str) -> None:
    model = build(configuration)
    before, unchanged = run(model, images), state(model)
    handle = lp.patch(model, method, [0, 0, 0, 0])
    unchanged()
    assert not handle.active
    assert torch.equal(run(model, images), before)
    handle.remove()
    unchanged()


@pytest.mark.parametrize("method", ["pomt", "random"])
def test_remove_restores_bit_identically(build: Any, configuration: str, images: Tensor, method: str) -> None:
    model = build(configuration)
    model.blocks[2].train()
    model.blocks[2].eval()
    model.blocks[2].training = True  # a flag of its own, that no blanket train() or eval() would bring back
    before, unchanged = run(model, images), state(model)
    keys = list(model.state_dict())
    handle = lp.patch(model, method, REMOVED)
    assert handle.active
    assert list(model.state_dict()) == keys
    assert not torch.equal(run(model, images), before)
    handle.remove()
    assert not handle.active
    unchanged()
    assert torch.equal(run(model, images), before)
    handle.remove()
    unchanged()


def test_patching_a_model_in_training_keeps_its_flags(build: Any, images: Tensor) -> None:
    model = build("layer-scale").train()
    unchanged = state(model)
    with lp.patch(model, "pomt", REMOVED):
        assert all(m.training for m in model.modules())
    unchanged()


def test_only_reducing_blocks_and_the_last_are_patched(build: Any) -> None:
    model = build()
    classes = [type(b) for b in model.blocks]
    for tail in (False, None):
        lp.patch(model, "pomt", REMOVED, tail=tail)
        touched = [type(b) is not c for b, c in zip(model.blocks, classes, strict=True)]
        assert touched == [False, True, True, tail is None]
        assert all(isinstance(b, c) for b, c in zip(model.blocks, classes, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_block_restores(build: Any, images: Tensor, error: type[BaseException]) -> None:
    model = build()
    before, unchanged = run(model, images), state(model)
    with pytest.raises(error), lp.patch(model, "pomt", REMOVED):  # noqa: PT012
        run(model, images)
        raise error
    unchanged()
    assert torch.equal(run(model, images), before)


@pytest.mark.usefixtures("no_mode_left")
def test_an_exception_in_forward_restores(build: Any, images: Tensor) -> None:
    model = build()
    before, unchanged = run(model, images), state(model)
    with pytest.raises(RuntimeError), lp.patch(model, "pomt", REMOVED):
        run(model, images[:, :1])
    unchanged()
    assert torch.equal(run(model, images), before)


def test_patching_again_replaces(build: Any, images: Tensor, leaving: Any) -> None:
    model, other = build(), build()
    unchanged = state(model)
    first = lp.patch(model, "pomt", REMOVED)
    second = lp.patch(model, RandomDrop(5), [4, 3, 0, 0])
    lp.patch(other, RandomDrop(5), [4, 3, 0, 0])
    assert (first.active, second.active) == (False, True)
    assert leaving(model, images) == (22, 19, 19, 19)
    assert torch.equal(run(model, images), run(other, images))
    first.remove()
    assert second.active
    assert torch.equal(run(model, images), run(other, images))
    with pytest.raises(lp.UnsupportedModelError, match=r"`output_fmt` must be 'NLC' .* got 'NCHW'"):
        model.forward_intermediates(images)
    second.remove()
    unchanged()


def test_the_same_patch_twice_is_the_patch_once(build: Any, images: Tensor) -> None:
    model, other = build(), build()
    unchanged = state(model)
    lp.patch(model, "pomt", REMOVED)
    handle = lp.patch(model, "pomt", REMOVED)
    lp.patch(other, "pomt", REMOVED)
    assert torch.equal(run(model, images), run(other, images))
    handle.remove()
    unchanged()


def test_update_gives_another_schedule(build: Any, images: Tensor, leaving: Any) -> None:
    model = build()
    before, unchanged = run(model, images), state(model)
    handle = lp.patch(model, "pomt", REMOVED)
    handle.update(lp.Schedule([0, 0, 0, 9]))
    assert handle.schedule == lp.Schedule([0, 0, 0, 9], "pomt")
    assert leaving(model, images) == (26, 26, 26, 17)
    with pytest.raises(lp.ScheduleError):
        handle.update([99, 0, 0, 0])
    assert handle.schedule == lp.Schedule([0, 0, 0, 9], "pomt")
    assert leaving(model, images) == (26, 26, 26, 17)
    handle.update([0, 0, 0, 0])
    assert not handle.active
    assert torch.equal(run(model, images), before)
    handle.update(REMOVED)
    assert leaving(model, images) == (26, 20, 15, 15)
    handle.remove()
    unchanged()


def test_a_rejected_replacement_keeps_the_patch(build: Any, images: Tensor, leaving: Any) -> None:
    model = build()
    handle = lp.patch(model, "pomt", REMOVED)
    with pytest.raises(lp.ScheduleError):
        lp.patch(model, "pomt", [99, 0, 0, 0])
    assert handle.active
    assert leaving(model, images) == (26, 20, 15, 15)


def test_unpatch_needs_no_handle(build: Any, images: Tensor) -> None:
    model = build()
    modules = [m for m in model.modules() if hasattr(m, "fused_attn")]
    for module in modules:
        module.fused_attn = False
    before, unchanged = run(model, images), state(model)
    lp.patch(model, "pomt", REMOVED)
    copied = copy.deepcopy(model)
    unpatch(nn.Sequential(model))
    unchanged()
    unpatch(copied)
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    assert [list(m.__dict__) for m in copied.modules()] == [list(m.__dict__) for m in model.modules()]
    assert torch.equal(run(copied, images), before)
    unpatch(copied)


def test_handle_repr(build: Any) -> None:
    handle = lp.patch(build(), "pomt", REMOVED)
    assert repr(handle) == "PatchHandle(POMT(), Schedule(depth=4, removed={1: 6, 2: 5}, method='pomt'), active)"
    handle.remove()
    assert repr(handle) == "PatchHandle(POMT(), Schedule(depth=4, removed={1: 6, 2: 5}, method='pomt'), not active)"


def test_hooks_and_attributes_of_the_user_are_kept(build: Any, images: Tensor) -> None:
    model, calls = build(), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append("after"))
    model.blocks[1].note = "mine"
    handle = lp.patch(model, "pomt", REMOVED)
    calls.clear()
    run(model, images)
    assert calls == ["after"]
    model.blocks[1].another = "mine too"
    handle.remove()
    assert (model.blocks[1].note, model.blocks[1].another) == ("mine", "mine too")
    run(model, images)
    assert calls == ["after"] * 2


def test_the_split_check_does_not_call_hooks(build: Any) -> None:
    """The random tokens of the check are not user data."""
    model, calls = build(), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append("after"))
    lp.patch(model, "pomt", REMOVED)
    assert calls == []


def test_a_hook_that_changes_the_output_still_does(build: Any, images: Tensor, caplog: Any) -> None:
    model, plain = build(), build()
    model.blocks[3].register_forward_hook(lambda module, args, output: 2 * output)
    with caplog.at_level("INFO", "lightning_prune"):
        lp.patch(model, "pomt", [0, 0, 0, 4])
        lp.patch(plain, "pomt", [0, 0, 0, 4])
    with torch.no_grad():
        x = plain.norm_pre(plain._pos_embed(plain.patch_embed(images)))
        assert torch.equal(model(images), plain.forward_head(plain.norm(2 * plain.blocks(x))))
    assert caplog.messages == [], "the block itself comes apart as before"


class TestErrors:
    @pytest.mark.parametrize(
        ("removed", "message"),
        [
            ([0] * 5, r"`schedule` must have 4 blocks, as the model, got 5\."),
            ([1], r"`schedule` must have 4 blocks, as the model, got 1\."),
            ([0, 25, 0, 0], r"at most 23 of the 26 tokens that enter block 1 with pomt, got 25\."),
            ([10, 0, 14, 0], r"at most 13 of the 16 tokens that enter block 2 with pomt, got 14\."),
            ([0, -1, 0, 0], r"`removed` must hold integers >= 0, got -1 for block 1\."),
        ],
    )
    def test_an_invalid_schedule_is_rejected(self, build: Any, removed: list[int], message: str) -> None:
        model = build()
        unchanged = state(model)
        with pytest.raises(lp.ScheduleError, match=message):
            lp.patch(model, "pomt", removed)
        unchanged()

    def test_a_reduction_before_block_0_is_rejected_in_other_blocks(self, build: Any) -> None:
        model = build()
        unchanged = state(model)
        message = r"`schedule` must remove tokens in block 0 only, before which random acts, got block 2\."
        with pytest.raises(lp.ScheduleError, match=message):
            lp.patch(model, RandomDrop(site="input"), [3, 0, 4, 0])
        unchanged()

    def test_an_unknown_method(self, build: Any) -> None:
        model = build()
        unchanged = state(model)
        with pytest.raises(ArgumentError, match="Did you mean 'pomt'"):
            lp.patch(model, "pomd", REMOVED)
        unchanged()

    @pytest.mark.usefixtures("no_mode_left")
    def test_an_attention_mask_is_rejected(self, build: Any, images: Tensor) -> None:
        model = build()
        mask = torch.zeros(26, 26)
        expected = run(model, images)
        message = r"`attn_mask` must be None in a model whose blocks remove tokens, got a mask\."
        with lp.patch(model, "random", REMOVED), pytest.raises(ArgumentError, match=message):
            model(images, attn_mask=mask)
        with torch.no_grad():
            torch.testing.assert_close(model(images, attn_mask=mask), expected)

    def test_a_class_replaced_after_patching_is_not_restored(self, build: Any) -> None:
        model = build()
        handle = lp.patch(model, "pomt", REMOVED)
        block = model.blocks[1]
        ours = type(block)
        block.__class__ = type("Parametrized", (ours,), {})
        with pytest.raises(lp.UnsupportedModelError, match=r"replaced by Parametrized"):
            handle.remove()
        block.__class__ = ours
        unpatch(model)
        assert "_prune_patch" not in block.__dict__

    def test_a_failure_during_patching_restores_all_blocks(self, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build()
        unchanged = state(model)
        adapter = lp.patching.find_vision_transformer(model).adapter

        def broken(self: Any, block: nn.Module) -> None:
            if block is model.blocks[2]:
                raise KeyboardInterrupt
            return None

        with monkeypatch.context() as patched:
            patched.setattr(type(adapter), "attn_mlp_split", broken)
            with pytest.raises(KeyboardInterrupt):
                lp.patch(model, "pomt", REMOVED)
        unchanged()


def test_a_model_can_be_collected_while_and_after_it_is_patched(build: Any, images: Tensor) -> None:
    model = build()
    handle = lp.patch(model, POMT(), REMOVED)
    run(model, images)
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


class TestForwardReplacedWhilePatched:
    """Replaces `forward` on the module itself, as accelerate does."""

    def replaced(self, model: Any) -> Any:
        block = model.blocks[1]
        inner = block.forward
        block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        return block

    def test_removal_raises_and_restores_the_others(self, build: Any, images: Tensor) -> None:
        model = build()
        dense = model(images)
        handle = lp.patch(model, "pomt", [0, 3, 3, 0])
        block = self.replaced(model)
        with pytest.raises(lp.UnsupportedModelError, match="`forward` of a patched Block was replaced after patching"):
            handle.remove()
        assert [is_patched_module(each) for each in model.blocks] == [False, True, False, False]
        del block.forward
        lp.patching.unpatch(model)
        assert torch.equal(model(images), dense)

    def test_a_failed_update_keeps_the_old_schedule(self, build: Any, images: Tensor) -> None:
        model = build()
        handle = lp.patch(model, "pomt", [0, 0, 3, 0])
        pruned = model(images)
        block = self.replaced(model)
        with pytest.raises(lp.UnsupportedModelError, match="was replaced on the module"):
            handle.update([0, 4, 0, 0])
        assert handle.active
        assert handle.schedule == lp.Schedule([0, 0, 3, 0], "pomt")
        del block.forward
        assert torch.equal(model(images), pruned)
