"""Several patches, repeated removal, and changes of device or dtype."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.patching.class_swap import is_patched_module

REMOVED = [0, 6, 0, 3]


def test_two_models_at_once(build: Any, images: Tensor) -> None:
    first, second, bystander = build(seed=1), build("siglip", seed=2), build(seed=1)
    dense = [model(images) for model in (first, second, bystander)]
    a = lp.patch(first, "pomt", REMOVED)
    only_first = first(images)
    b = lp.patch(second, "random", [4, 0, 0, 0])
    assert torch.equal(first(images), only_first)
    assert torch.equal(bystander(images), dense[2])
    both = second(images)
    a.remove()
    assert not a.active
    assert b.active
    assert torch.equal(first(images), dense[0])
    assert torch.equal(second(images), both)
    b.remove()
    assert torch.equal(second(images), dense[1])


def test_two_in_one_module(build: Any, images: Tensor) -> None:
    model = nn.ModuleDict({"student": build(seed=1), "teacher": build(seed=2)})
    dense = {name: each(images) for name, each in model.items()}
    student = lp.patch(model, "pomt", REMOVED, module_path="student")
    assert torch.equal(model["teacher"](images), dense["teacher"])
    teacher = lp.patch(model, "random", REMOVED, module_path="teacher")
    assert student.active
    student.remove()
    assert teacher.active
    assert torch.equal(model["student"](images), dense["student"])
    assert not torch.equal(model["teacher"](images), dense["teacher"])
    teacher.remove()
    assert torch.equal(model["teacher"](images), dense["teacher"])


def test_removed_twice(build: Any, images: Tensor) -> None:
    model = build()
    dense = model(images)
    handle = lp.patch(model, "pomt", REMOVED)
    for _ in range(2):
        handle.remove()
        assert not handle.active
        assert torch.equal(model(images), dense)
    again = lp.patch(model, "random", REMOVED)
    handle.remove()
    assert again.active, "an old handle does not undo another patch"
    with again:
        again.remove()
    assert torch.equal(model(images), dense)


def test_used_again_after_removal(build: Any, images: Tensor) -> None:
    model = build()
    handle = lp.patch(model, "pomt", REMOVED)
    pruned = model(images)
    handle.remove()
    handle.update(REMOVED)
    assert handle.active
    assert torch.equal(model(images), pruned)


@pytest.mark.parametrize("name", ["vit", "res-post", "parallel-things"])
def test_moved_to_another_dtype_while_patched(build: Any, images: Tensor, name: str, relative_error: Any) -> None:
    model = build(name)
    single = build(name)
    with lp.patch(model, "pomt", REMOVED) as handle:
        pruned = model(images)
        model.double()
        assert relative_error(pruned, model(images.double())) < 1e-5
        model.float()
        assert torch.equal(model(images), pruned)
    assert not handle.active
    assert torch.equal(model(images), single(images))


def test_moved_to_another_device_while_patched(build: Any, images: Tensor) -> None:
    """The meta device is available on every machine."""
    model = build()
    pruned_on_cpu = lp.patch(model, "pomt", REMOVED)
    model(images)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.to("meta")
    moved = model(images.to("meta"))
    assert moved.device.type == "meta"
    assert moved.shape == (2, 7)
    model.to_empty(device="cpu").load_state_dict(state)
    with lp.patch(build(), "pomt", REMOVED) as other:
        assert torch.equal(model(images), other.transformer.root(images))
    pruned_on_cpu.remove()
    assert torch.equal(model(images), build()(images))


def test_frozen_and_trained(build: Any, images: Tensor) -> None:
    model = build()
    flags = [True, False]
    for flag in flags:
        model.requires_grad_(flag)
        model.head.requires_grad_(True)
        with lp.patch(model, "pomt", REMOVED):
            model(images).sum().backward()
        assert all(p.requires_grad is flag for n, p in model.named_parameters() if not n.startswith("head"))
        assert (model.blocks[0].attn.qkv.weight.grad is not None) is flag
        assert model.head.weight.grad.isfinite().all()
        model.zero_grad(set_to_none=True)


def test_a_copy_outlives_the_original(build: Any, images: Tensor) -> None:
    model = build()
    dense = model(images)
    handle = lp.patch(model, "pomt", REMOVED)
    other, pruned = copy.deepcopy(model), model(images)
    handle.remove()
    assert torch.equal(other(images), pruned)
    assert torch.equal(model(images), dense)
    lp.patching.unpatch(other)
    assert torch.equal(other(images), dense)


class Encoder(nn.Module):
    """A larger model that contains a ViT."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Identity(), nn.ModuleDict({"vit": vit})["vit"])
        self.decoder = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.backbone(x).relu())
        return out


@pytest.mark.long
@pytest.mark.parametrize(
    "wrap", [lambda m: nn.Sequential(m, nn.ReLU()), Encoder, lambda m: torch.compile(m, backend="eager")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_at_any_depth(build: Any, images: Tensor, wrap: Any, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    vit = build()
    model, images = wrap(vit).to(dtype).eval(), images.to(dtype)
    with torch.no_grad():
        dense = model(images)
        with lp.patch(model, "pomt", REMOVED) as handle:
            assert handle.transformer.root is vit
            assert not torch.equal(model(images), dense)
        assert torch.equal(model(images), dense)
    assert not any(is_patched_module(module) for module in model.modules())


def test_dynamic_quantization(build: Any, images: Tensor) -> None:
    """Eager-mode quantization replaces each `Linear` by a module that packs its weight."""
    model = torch.ao.quantization.quantize_dynamic(build(), {nn.Linear}, dtype=torch.qint8)
    dense = model(images)
    with lp.patch(model, "pomt", REMOVED), torch.no_grad():
        pruned = model(images)
    with lp.patch(build(), "pomt", REMOVED) as handle, torch.no_grad():
        exact = handle.transformer.root(images)
    assert torch.nn.functional.cosine_similarity(pruned, exact).min() > 0.9
    assert torch.equal(model(images), dense)
