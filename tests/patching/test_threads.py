"""One patched model in several threads, as in servers: each forward pass has its own state."""

import gc
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Barrier
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_prune as lp
from lightning_prune.patching.token_state import TokenState
from lightning_prune.reduction import POMT, Reduction, ReductionOutput, TokenSequence

from .sweep import coverage

REMOVED = [0, 6, 0, 5]


class Brightest(Reduction):
    """Keeps the patches with the highest mean before block 0; reads the images."""

    name: ClassVar[str] = "brightest"
    site = "input"
    reads: ClassVar[frozenset[str]] = frozenset({"pixels"})

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        assert sequence.pixels is not None
        means = nn.functional.avg_pool2d(sequence.pixels.mean(1, keepdim=True), 16).flatten(1)
        kept = means.topk(means.shape[1] - remove).indices.sort().values + sequence.num_prefix_tokens
        index = torch.cat((torch.arange(sequence.num_prefix_tokens).expand(len(kept), -1), kept), dim=1)
        return ReductionOutput(
            sequence.tokens.gather(1, index[..., None].expand(-1, -1, sequence.tokens.shape[2])), index
        )

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return tokens - num_prefix_tokens - 1


MODELS: dict[str, tuple[str, Any, list[int]]] = {
    "rope": ("vit_small_patch16_dinov3", "pomt", REMOVED),
    "bias": ("vit_relpos_small_patch16_224", "pomt", REMOVED),
    "unfused": ("cait_xxs24_224", POMT(), REMOVED),
    "pixels": ("vit_tiny_patch16_224", Brightest(), [9, 0, 0, 0]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_threads_are_independent(kind: str) -> None:
    name, method, removed = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # the others' turn, in the middle of everything
            module.register_forward_pre_hook(lambda *_: time.sleep(2e-4))
    for block in model.blocks:
        block.register_forward_hook(lambda *_: time.sleep(2e-4))
    batches = [torch.randn(1 + i % 3, 3, 80, 80, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    with lp.patch(model, method, removed), torch.no_grad():
        expected = [model(batch) for batch in batches]
        together = Barrier(len(batches))

        def serve(batch: Tensor) -> list[Tensor]:
            together.wait()
            with torch.no_grad():
                return [model(batch) for _ in range(10)]

        with ThreadPoolExecutor(len(batches)) as pool:
            for found, alone in zip(pool.map(serve, batches), expected, strict=True):
                assert all(torch.equal(each, alone) for each in found)


@contextmanager
def only_new_objects_collected() -> Iterator[None]:
    """Collects garbage only among new objects, because the existing ones take most of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_no_state_is_kept(kind: str, trained: bool) -> None:
    """Images and positions of a batch are freed after its forward and backward pass."""
    name, method, removed = MODELS[kind]
    model = timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80).eval()

    def run(images: Tensor) -> Any:
        with torch.set_grad_enabled(trained):
            output = model(images)
            if trained:
                output.sum().backward()
        return weakref.ref(images)

    with lp.patch(model, method, removed), ThreadPoolExecutor(3) as pool, only_new_objects_collected():
        references = [future.result() for future in [pool.submit(run, torch.randn(1, 3, 80, 80)) for _ in range(3)]]
        gc.collect()
        assert [reference() for reference in references] == [None] * 3
        assert not [each for each in gc.get_objects() if isinstance(each, TokenState)]


def gradients(model: Any, batches: list[Tensor], elsewhere: bool) -> list[Tensor]:
    """Gradients of the sum over several forward passes; backward may run in another thread, as on a GPU."""
    model.zero_grad(set_to_none=True)
    loss = sum(model(images).square().sum() for images in batches)
    with torch.no_grad():
        model(torch.randn(1, 3, 80, 80).double())  # a forward pass of others in between
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result() if elsewhere else loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [*((kind, False) for kind in MODELS), ("unfused", True), ("pixels", True)],  # the others' blocks take keywords
)
def test_checkpointed_blocks_have_their_state_in_backward(
    kind: str, frozen: int, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, method, removed = MODELS[kind]
    torch.manual_seed(0)
    model = coverage.stir(timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80, num_classes=5))
    model = model.double()
    for part in (model.patch_embed, *model.blocks[:frozen]):
        part.requires_grad_(frozen == 0)
    module = __import__(type(model).__module__, fromlist=["checkpoint"])
    for attribute in ("checkpoint", "checkpoint_seq"):
        if hasattr(module, attribute):
            monkeypatch.setattr(module, attribute, partial(getattr(module, attribute), use_reentrant=reentrant))
    batches = list(torch.randn(2, 2, 3, 80, 80).double())
    with lp.patch(model, method, removed):
        expected = gradients(model, batches, elsewhere=False)
        model.set_grad_checkpointing(True)
        for elsewhere in (False, True):
            given = gradients(model, batches, elsewhere)
            assert len(given) == len(expected) > 3
            assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["rope", "bias"])
def test_a_checkpoint_around_the_whole_model(kind: str, reentrant: bool) -> None:
    name, method, removed = MODELS[kind]
    model = timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80, num_classes=5).eval().double()
    images = torch.randn(2, 3, 80, 80).double().requires_grad_()
    with lp.patch(model, method, removed):
        (expected,) = torch.autograd.grad(model(images).square().sum(), images)
        model(torch.randn(1, 3, 80, 80).double())
        checkpoint(model, images, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(images.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("which", [(1,), (2, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_blocks_compiled_one_by_one(kind: str, which: tuple[int, ...]) -> None:
    """Regional compilation: state is passed between compiled and other blocks."""
    name, method, removed = MODELS[kind]
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80, num_classes=5).eval()
    images = torch.randn(2, 3, 80, 80)
    with lp.patch(model, method, removed), torch.no_grad():
        expected = model(images)
        for index in which:
            model.blocks[index].compile(backend="eager")
        if kind == "pixels" and 0 in which:
            with pytest.raises(Exception, match=r"were not captured\. Run the whole model, and compile all of it"):
                model(images)
            return
        for _ in range(2):
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rope", "bias"])
def test_tensors_without_a_storage(kind: str) -> None:
    """Tensors of `torch.func`, for which the state is attached to the tensor only."""
    name, method, removed = MODELS[kind]
    model = timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80, num_classes=5).eval().double()
    model.requires_grad_(False)  # torch.func cannot differentiate fused attention by its mask, pruned or not
    images = torch.randn(2, 3, 80, 80).double()
    with lp.patch(model, method, removed):
        batched = torch.vmap(lambda image: model(image[None])[0])(images)
        torch.testing.assert_close(batched, model(images))
        gradient = torch.func.grad(lambda x: model(x).square().sum())(images)
        (expected,) = torch.autograd.grad(model(images.requires_grad_()).square().sum(), images)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.long
@torch.no_grad()
def test_blocks_wrapped_by_compile() -> None:
    """`model.blocks[i] = torch.compile(block)` puts another module in its place; the block itself is patched."""
    torch._dynamo.reset()
    model = timm.create_model(MODELS["rope"][0], depth=4, embed_dim=32, num_heads=4, img_size=80).eval()
    images = torch.randn(2, 3, 80, 80)
    dense = model(images)
    with lp.patch(model, "pomt", REMOVED):
        expected = model(images)
    for index in (1, 2):
        model.blocks[index] = torch.compile(model.blocks[index], backend="eager")
    model(images)
    with lp.patch(model, "pomt", REMOVED) as handle:
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        handle.update(REMOVED)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images), dense, rtol=1e-5, atol=1e-5)


def test_replaced_tokens_are_rejected() -> None:
    """A hook that returns new tokens loses the state, which is an error if there is any."""
    model = timm.create_model(MODELS["rope"][0], depth=4, embed_dim=32, num_heads=4, img_size=80).eval()
    images = torch.randn(1, 3, 80, 80)
    model.blocks[1].register_forward_hook(lambda _, args, output: output.clone())
    message = "tokens that enter block 2 must be the output of the previous block"
    with lp.patch(model, "pomt", REMOVED), pytest.raises(lp.UnsupportedModelError, match=message):
        model(images)
    plain = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=4, img_size=80).eval()
    with lp.patch(plain, "pomt", REMOVED):
        expected = plain(images)
        plain.blocks[1].register_forward_hook(lambda _, args, output: output.clone())
        assert torch.equal(plain(images), expected)
