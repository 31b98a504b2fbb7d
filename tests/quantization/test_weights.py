"""Int8 weights, compared with a float64 reference; on models of three libraries."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.utils import should_reduce_range

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_hugging_face_vit, tiny_torchvision_vit, tiny_vit
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.quantization import Int8Weights

SMALL = {"embed_dim": 64, "depth": 2, "num_classes": 16}


def vit(**more: Any) -> nn.Module:
    model: nn.Module = tiny_vit("vit_tiny_patch16_224", seed=None, **SMALL | more)
    return model


def hybrid() -> nn.Module:
    """A model with a convolutional stem."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1))
    return vit(embed_layer=lambda **_: timm.layers.HybridEmbed(stem, embed_dim=64, img_size=32, patch_size=2))


def torchvisions() -> nn.Module:
    model = tiny_torchvision_vit(2, 64, 128, 16)
    nn.init.normal_(model.heads.head.weight)
    return model


def hugging_face() -> nn.Module:
    model: nn.Module = tiny_hugging_face_vit(
        "ViTForImageClassification", hidden_size=64, num_hidden_layers=2, intermediate_size=128
    )
    return model


MODELS: dict[str, Any] = {
    "timm": vit,
    "hybrid": hybrid,
    "beit": lambda: tiny_vit("beit_base_patch16_224", seed=None, **SMALL),
    "eva": lambda: tiny_vit("eva02_tiny_patch14_224", seed=None, **SMALL, mlp_ratio=2),
    "torchvision": torchvisions,
    "huggingface": hugging_face,
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = MODELS[name]()
    return model


def images(batch: int = 2) -> Tensor:
    return noise_images(batch, seed=1)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    logits: Tensor = getattr(out, "logits", out)
    return logits


def snapshot(model: nn.Module) -> tuple[list[str], list[Any], list[Tensor]]:
    """Keys, identity, `requires_grad` and values of the parameters."""
    parameters = [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    return list(model.state_dict()), parameters, [value.clone() for value in model.state_dict().values()]


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[:2] == other[:2] and all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


def alike(one: Tensor, other: Tensor, least: float) -> bool:
    """Rounding errors move values between two quantization steps, so int8 results only agree approximately."""
    return float(F.cosine_similarity(one.float(), other.float()).min()) > least


def test_matches_quantize_() -> None:
    """Of the whole model, except that modules stay as they are."""
    model, other = build("timm"), build("timm")
    narrow = should_reduce_range(torch.device("cpu"))
    quantize_(other, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=narrow))
    attributes = [list(vars(module)) for module in model.modules()]
    with Int8Weights(model):
        assert torch.equal(run(model, images()), run(other, images()))
        assert [list(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_and_remove_on_every_kind_of_model(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    x = images().to(dtype)
    dense, before = run(model, x), snapshot(model)
    int8 = Int8Weights(model)
    assert same(snapshot(model), before)
    for _ in range(2):
        int8.apply()
        int8.apply()
        quantized = run(model, x)
        assert list(model.state_dict()) == before[0]
        int8.remove()
        int8.remove()
        assert not int8.active
        assert same(snapshot(model), before)
        assert torch.equal(run(model, x), dense)
    assert quantized.dtype == dtype
    assert not torch.equal(quantized, dense)
    assert alike(quantized, dense, 0.95)


def test_what_stays_in_float() -> None:
    layers = Int8Weights(hybrid())
    assert not layers.kept
    assert len(layers.quantized) == 4 * 2 + 1
    layers = Int8Weights(torchvisions())
    assert len(layers.quantized) == 2 * 2 + 1
    assert set(layers.kept.values()) == {"its projections are read by one native call of nn.MultiheadAttention"}
    assert len(layers.kept) == 2
    assert Int8Weights(vit(num_classes=10)).kept == {"head": "64 -> 10: sizes must be multiples of 8"}
    reason = "its weight is passed to F.linear by keyword, which torchao does not support"
    assert Int8Weights(build("beit")).kept == {f"blocks.{block}.attn.qkv": reason for block in (0, 1)}
    partly = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).double(), nn.LazyLinear(8), nn.Linear(8, 8))
    torch.nn.utils.parametrizations.weight_norm(partly[3])
    assert Int8Weights(partly).kept == {
        "1": "its weight is float64",
        "2": "its weight is computed (a parametrization) or not initialised yet",
        "3": "its weight is computed (a parametrization) or not initialised yet",
    }


@pytest.mark.parametrize("name", MODELS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model, x = build(name), images(4)
    with Int8Weights(model):
        together, alone = run(model, x), torch.cat([run(model, one) for one in x.split(1)])
    assert alike(together, alone, 0.999)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["pomt", "random"])
def test_together_with_a_patch(name: str, method: str) -> None:
    """In any order of applying and removing."""
    model, x = build(name), images()
    dense, before = run(model, x), snapshot(model)
    int8, schedule = Int8Weights(model), [0, 5]
    with int8:
        quantized = run(model, x)
        with lp.patch(model, method, schedule):
            both = run(model, x)
        assert torch.equal(run(model, x), quantized)
    with lp.patch(model, method, schedule) as handle:
        pruned = run(model, x)
        with int8:
            assert torch.equal(run(model, x), both)
        assert torch.equal(run(model, x), pruned)
        int8.apply()
        handle.remove()
        assert torch.equal(run(model, x), quantized)
        int8.remove()
    assert same(snapshot(model), before)
    assert torch.equal(run(model, x), dense)
    assert not torch.equal(both, pruned)


def test_compiled() -> None:
    torch._dynamo.reset()
    model, x = vit(depth=1), images()
    int8 = Int8Weights(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        dense = run(compiled, x)
        assert torch.allclose(dense, run(model, x), atol=1e-4)
        with int8:
            quantized = run(compiled, x)
            assert alike(quantized, run(model, x), 0.999)
            assert not torch.equal(quantized, dense)
    torch._dynamo.reset()


def test_exported() -> None:
    model, x = vit(depth=1), images()
    with Int8Weights(model), torch.no_grad():
        assert alike(torch.export.export(model, (x,)).module()(x), model(x), 0.999)


def test_autocast() -> None:
    model, x = build("timm"), images()
    dense = run(model, x)
    with Int8Weights(model), torch.autocast("cpu", torch.bfloat16):
        quantized = run(model, x)
    assert alike(quantized, dense, 0.95)


def test_quantized_in_inference_mode_and_used_with_gradients() -> None:
    model, x = build("timm"), images().requires_grad_()
    with torch.inference_mode():
        int8 = Int8Weights(model)
        int8.apply()
        model(images())
    model(x).sum()  # records a graph through int8 weights, which inference tensors would refuse
    int8.remove()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_changed_weights_are_quantized_again() -> None:
    model, other = build("timm"), build("timm", seed=7)
    int8 = Int8Weights(model)
    with Int8Weights(other):
        expected = run(other, images())
    model.load_state_dict(other.state_dict())
    with int8:
        assert torch.equal(run(model, images()), expected)
    replaced = build("timm")
    int8 = Int8Weights(replaced)
    replaced.load_state_dict(other.state_dict(), assign=True)
    with int8:
        assert torch.equal(run(replaced, images()), expected)


def test_moved_while_applied() -> None:
    model, x = build("timm"), images()
    half, source = run(copy.deepcopy(model).bfloat16(), x.bfloat16()), model.blocks[0].mlp.fc1.weight
    with Int8Weights(model):
        model.bfloat16()
        assert run(model, x.bfloat16()).dtype == torch.bfloat16
    assert model.blocks[0].mlp.fc1.weight is source
    assert torch.equal(run(model, x.bfloat16()), half)
    int8 = Int8Weights(model)
    int8.apply()
    model.float()
    with torch.inference_mode():
        int8.remove()
    assert model.blocks[0].mlp.fc1.weight is source
    assert run(model, x).dtype == torch.float32
    assert model(x).requires_grad  # no inference tensor is left in the model
    with Int8Weights(model):
        model.to("meta")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_shared_weight_is_quantized_once() -> None:
    """Of two layers, and of one that is used twice."""
    twice = nn.Linear(16, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), twice, nn.GELU(), twice)
    model[2].weight = model[0].weight
    before = snapshot(model)
    with Int8Weights(model) as int8:
        assert model[2].weight is model[0].weight
        assert len({id(parameter) for parameter in model.parameters() if not parameter.requires_grad}) == 2
    assert len(int8.quantized) == 3
    assert model[2].weight is model[0].weight
    assert same(snapshot(model), before)


def test_weights_are_quantized_once() -> None:
    model = vit(depth=1)
    int8 = Int8Weights(model)
    used = []
    for _ in range(2):
        with int8:
            used.append([id(parameter) for parameter in model.parameters()])
    assert used[0] == used[1]


def test_copied_and_pickled_while_applied() -> None:
    model = build("timm")
    with Int8Weights(model):
        quantized = run(model, images())
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(run(other, images()), quantized) for other in copies)


def test_restored_after_an_error() -> None:
    model = build("timm")
    before = snapshot(model)
    with pytest.raises((RuntimeError, AssertionError)), Int8Weights(model):
        model(torch.zeros(1, 5, 32, 32))
    assert same(snapshot(model), before)


def test_a_failure_changes_nothing() -> None:
    model = build("timm")
    int8, other = Int8Weights(model), Int8Weights(model.blocks[1])
    with other:
        before = [type(parameter) for parameter in model.parameters()]
        with pytest.raises(ArgumentError, match="`module` must have float weights, got quantized weights"):
            int8.apply()
        assert not int8.active
        assert [type(parameter) for parameter in model.parameters()] == before
        with pytest.raises(ArgumentError, match="`module` must have float weights, got quantized weights"):
            Int8Weights(model)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(3, 8, 1), r"^Conv2d has no linear layer that can be quantized: it has none\."),
        (nn.Linear(8, 10), r"^Linear has no .* quantized: Linear: 8 -> 10: sizes must be multiples of 8\."),
        (nn.Sequential(nn.Linear(8, 8).double()), r"quantized: 0: its weight is float64\."),
    ],
)
def test_a_model_without_layers_is_rejected(module: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Int8Weights(module)


def test_repr() -> None:
    int8 = Int8Weights(vit(num_classes=10))
    assert repr(int8) == "Int8Weights(8 layers, 1 in float, off)"
    with int8:
        assert repr(int8) == "Int8Weights(8 layers, 1 in float, on)"
