"""Where the transformer sits in the user's module, and in what state: each through a real `trainer.validate`."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lightning_prune as lp
from helpers.data import loader, noise_images
from helpers.models import CLASSES, tiny_vit
from lightning_prune.patching.class_swap import is_patched_module

from .tiny import Tiny, brief, trainer

pytestmark = pytest.mark.usefixtures("clockwork")


class Placed(Tiny):
    """A module around any network; says its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        del self.vit
        self.network = network
        self.logits: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.logits.append(self(batch[0]).clone())


class Encoding(nn.Module):
    """A larger model: the transformer's tokens go through a head of its own, next to a convolutional branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.backbone = nn.ModuleDict({"encoder": tiny_vit(num_classes=0), "stem": nn.Conv2d(3, 32, 8, 8)})
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone["encoder"].forward_features(images)
        return self.head(tokens[:, 0] + tokens[:, 1:].mean(1) + self.backbone["stem"](images).mean((2, 3)))


class Shared(nn.Module):
    """One transformer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.student = self.teacher = tiny_vit()

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images) + self.teacher(images.flip(-1))


def normalised() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(tiny_vit()), nn.Softmax(-1))


def frozen() -> nn.Module:
    return tiny_vit().requires_grad_(False)


def trained_in_part() -> nn.Module:
    vit = tiny_vit()
    vit.blocks[:2].requires_grad_(False)
    return vit


def compiled() -> nn.Module:
    wrapper: Any = torch.compile(tiny_vit(depth=2), backend="eager")  # every token count is traced anew: half as long
    return wrapper


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(tiny_vit(), {nn.Linear}, torch.qint8)


def weights_quantized() -> nn.Module:
    vit = tiny_vit()
    quantize_(vit, Int8WeightOnlyConfig())
    assert type(vit.blocks[1].mlp.fc1.weight).__name__ != "Parameter"
    return vit


PLACES: dict[str, Callable[[], nn.Module]] = {
    "at an attribute": tiny_vit,
    "in a compiled wrapper": compiled,
    "the encoder of a larger model": Encoding,
    "in a Sequential": normalised,
    "under two names": Shared,
    "frozen": frozen,
    "frozen in part": trained_in_part,
    "dynamically quantized": quantized,
    "weights quantized by torchao": weights_quantized,
}
SLOW = ("in a compiled wrapper", "auto")  # test_loops.py plans for a compiled transformer


def say(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(noise_images(8, seed=1))


@pytest.mark.parametrize(
    ("place", "schedule"), [(place, way) for place in PLACES for way in (6, "auto") if (place, way) != SLOW]
)
def test_a_transformer_is_pruned_and_restored_wherever_the_module_holds_it(place: str, schedule: Any) -> None:
    torch._dynamo.reset()
    network = PLACES[place]()
    dense = say(network)
    trainable = [p.requires_grad for p in network.parameters()]
    keys = list(network.state_dict())
    module, callback = Placed(network), brief(schedule=schedule, objective=lp.LatencyBudget(speedup=1.2))
    trainer(callback).validate(module, loader(8), verbose=False)
    pruned = torch.cat(module.logits)
    assert not any(is_patched_module(part) for part in module.modules())
    assert torch.equal(say(network), dense)
    assert (list(network.state_dict()), [p.requires_grad for p in network.parameters()]) == (keys, trainable)
    assert callback.decision.schedule.total_removed > 0
    assert callback.decision.context["compiled"] is (place == "in a compiled wrapper")
    with lp.patch(network, "pomt", callback.decision.schedule), torch.no_grad():
        expected = torch.cat([network(images) for images in noise_images(8, seed=1).split(4)])
    assert torch.equal(pruned, expected)
    assert not torch.allclose(pruned, dense, atol=1e-4)
    torch._dynamo.reset()


class Twice(nn.Module):
    def __init__(self, second: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.student = tiny_vit()
        self.other = nn.ModuleDict({"teacher": second()})

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images) + self.other["teacher"](images)


@pytest.mark.parametrize(
    ("second", "schedule"),
    [(tiny_vit, 6), (tiny_vit, "auto"), (lambda: copy.deepcopy(tiny_vit()), 6), (compiled, [6, 0])],
    ids=["own", "auto", "copy", "compiled"],
)
def test_module_path_chooses_one_of_two_transformers(second: Any, schedule: Any) -> None:
    torch._dynamo.reset()
    module = Placed(Twice(second))
    inner = "network.other.teacher._orig_mod" if second is compiled else "network.other.teacher"
    message = (
        r"^`module_path` must be one of 'network.student' \(VisionTransformer\), "
        rf"'{inner}' \(VisionTransformer\), because .*, got None\.$"
    )
    with pytest.raises(lp.UnsupportedModelError, match=message):
        trainer(brief(schedule=schedule)).validate(module, loader(8), verbose=False)
    assert module.logits == []
    outputs = []
    targets = (("network.student", (1, 0)), ("network.other.teacher", (0, 1)))
    for target, parts in targets[second is compiled :]:  # the schedule there is for the depth of the compiled one
        module.logits.clear()
        callback = brief(schedule=schedule, module_path=target)
        trainer(callback).validate(module, loader(8), verbose=False)
        outputs.append(torch.cat(module.logits))
        vits = (module.network.student, module.network.other["teacher"])
        expected = torch.zeros(8, CLASSES)
        for vit, prunes in zip(vits, parts, strict=True):
            if prunes:
                with lp.patch(vit, "pomt", callback.decision.schedule), torch.no_grad():
                    expected += torch.cat([vit(images) for images in noise_images(8, seed=1).split(4)])
            else:
                with torch.no_grad():
                    expected += torch.cat([vit(images) for images in noise_images(8, seed=1).split(4)])
        assert torch.allclose(outputs[-1], expected, atol=1e-5)
        assert not any(is_patched_module(part) for part in module.modules())
    torch._dynamo.reset()
