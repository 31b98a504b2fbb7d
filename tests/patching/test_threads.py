"""One patched model in several threads at once, as servers run it: each forward pass keeps its own account."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.patching.per_thread import PerThread
from lightning_prune.reduction import POMT, Reduced, Reduction, Sequence

REMOVED = [0, 6, 0, 5]


class Brightest(Reduction):
    """Keeps the patches of the highest mean, before block 0; reads the images."""

    name: ClassVar[str] = "brightest"
    site = "input"
    reads: ClassVar[frozenset[str]] = frozenset({"pixels"})

    def reduce(self, sequence: Sequence, remove: int) -> Reduced:
        assert sequence.pixels is not None
        means = nn.functional.avg_pool2d(sequence.pixels.mean(1, keepdim=True), 16).flatten(1)
        kept = means.topk(means.shape[1] - remove).indices.sort().values + sequence.prefix_tokens
        index = torch.cat((torch.arange(sequence.prefix_tokens).expand(len(kept), -1), kept), dim=1)
        return Reduced(sequence.tokens.gather(1, index[..., None].expand(-1, -1, sequence.tokens.shape[2])), index)

    def capacity(self, tokens: int, prefix_tokens: int) -> int:
        return tokens - prefix_tokens - 1


MODELS: dict[str, tuple[str, Any, list[int]]] = {
    "rope": ("vit_small_patch16_dinov3", "pomt", REMOVED),
    "bias": ("vit_relpos_small_patch16_224", "pomt", REMOVED),
    "told": ("cait_xxs24_224", POMT(), REMOVED),
    "pixels": ("vit_tiny_patch16_224", Brightest(), [9, 0, 0, 0]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_threads_do_not_disturb_one_another(kind: str) -> None:
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


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_left_behind(kind: str) -> None:
    """Neither images nor places of a batch outlive its forward pass, whatever threads there were."""
    name, method, removed = MODELS[kind]
    model = timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80).eval()
    with lp.patch(model, method, removed):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(torch.inference_mode()(model), [torch.randn(1, 3, 80, 80)] * 3))
        sites = [vars(module)["_prune_site"] for module in model.modules() if "_prune_site" in vars(module)]
        states = [value for site in sites for value in vars(site).values() if isinstance(value, PerThread)]
        assert states
        assert not any(state._values for state in states)


def gradients(model: Any, images: Tensor, elsewhere: bool) -> list[Tensor]:
    """Of all parameters that have one; backward runs in another thread where asked, as it does on a GPU."""
    model.zero_grad(set_to_none=True)
    loss = model(images).square().sum()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result() if elsewhere else loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [*((kind, False) for kind in MODELS), ("told", True), ("pixels", True)],  # the others' blocks take keywords
)
def test_checkpointed_blocks_find_their_state_in_backward(
    kind: str, frozen: int, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, method, removed = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, depth=4, embed_dim=32, num_heads=4, img_size=80, num_classes=5).eval()
    for part in (model.patch_embed, *model.blocks[:frozen]):
        part.requires_grad_(frozen == 0)
    module = __import__(type(model).__module__, fromlist=["checkpoint"])
    for attribute in ("checkpoint", "checkpoint_seq"):
        if hasattr(module, attribute):
            monkeypatch.setattr(module, attribute, partial(getattr(module, attribute), use_reentrant=reentrant))
    images = torch.randn(2, 3, 80, 80)
    with lp.patch(model, method, removed):
        expected = gradients(model, images, elsewhere=False)
        model.set_grad_checkpointing(True)
        for elsewhere in (False, True):
            found = gradients(model, images, elsewhere)
            assert len(found) == len(expected) > 3
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, expected, strict=True))
