"""A copy with the first blocks only: same blocks, same weights, and the original as it was."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import lightning_prune as lp
from helpers.models import tiny_hugging_face_vit, tiny_torchvision_vit, tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.truncation import truncated

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EVA = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm": tiny_vit,
    "timm with rotary embedding": lambda: timm.create_model("eva02_tiny_patch14_224", **EVA).eval(),
    "torchvision": tiny_torchvision_vit,
    "Hugging Face": tiny_hugging_face_vit,
}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_the_first_blocks_run_as_in_the_whole_model(make: Callable[[], nn.Module]) -> None:
    whole = find_vision_transformer(make())
    copied = truncated(whole, 2)
    assert (copied.depth, whole.depth) == (2, 4)
    outputs: dict[str, list[torch.Tensor]] = {"whole": [], "copied": []}
    for name, transformer in (("whole", whole), ("copied", copied)):
        transformer.blocks[1].register_forward_hook(lambda _, __, y, name=name: outputs[name].append(y))
    with torch.no_grad():
        whole.root(IMAGES)
        result = copied.root(IMAGES)
    assert torch.equal(outputs["whole"][0], outputs["copied"][0])
    assert type(result) is type(whole.root(IMAGES))


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_weights_are_shared_and_the_model_is_left_alone(make: Callable[[], nn.Module]) -> None:
    model = make()
    whole = find_vision_transformer(model)
    names = dict(model.named_parameters())
    copied = truncated(whole, 1)
    own = dict(copied.root.named_parameters())
    assert all(any(parameter is other for other in names.values()) for parameter in own.values())
    with lp.patch(copied.root, "topk", [3]):
        assert not any(type(module).__name__.startswith("Patched") for module in model.modules())
    assert dict(model.named_parameters()).keys() == names.keys()


def test_blocks_that_are_not_one_list() -> None:
    model = tiny_vit()
    whole = find_vision_transformer(model)
    model.blocks[1] = torch.compile(model.blocks[1])
    with pytest.raises(lp.UnsupportedModelError, match=r"VisionTransformer"):
        truncated(whole, 2)
