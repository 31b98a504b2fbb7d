import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from helpers.fresh import run_fresh
from lightning_prune.patching.class_swap import (
    PatchedModule,
    is_patched_module,
    original_class,
    restore_class,
    swap_class,
)
from lightning_prune.reduction import RandomDrop

REMOVED = [0, 6, 5, 0]
NAMES = ["vit", "dinov2-registers", "siglip", "distilled", "parallel-things"]


class Doubled(PatchedModule):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_swap_and_restore() -> None:
    module = nn.Linear(3, 3)
    x = torch.ones(1, 3)
    before, entries = module(x), dict(module.__dict__)
    swap_class(module, Doubled, "site")
    assert is_patched_module(module)
    assert original_class(module) is nn.Linear
    assert isinstance(module, nn.Linear)
    assert torch.equal(module(x), 2 * before)
    assert type(module).__name__ == "DoubledLinear"
    restore_class(module)
    assert type(module) is nn.Linear
    assert module.__dict__ == entries
    restore_class(module)
    assert torch.equal(module(x), before)


def test_one_class_per_pair() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    swap_class(one, Doubled)
    swap_class(other, Doubled)
    assert type(one) is type(other)


def same_when_patched(model: nn.Module, other: nn.Module, images: Tensor) -> None:
    """Two patched models give the same results, and can be unpatched independently."""
    with torch.no_grad():
        pruned = model(images)
        assert torch.equal(other(images), pruned)
        assert list(other.state_dict()) == list(model.state_dict())
        lp.patching.unpatch(other)
        assert [type(m) for m in other.modules()] == [original_class(m) for m in model.modules()]
        assert not torch.equal(other(images), pruned)
        assert torch.equal(model(images), pruned)
        lp.patching.unpatch(model)
        assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["pomt", RandomDrop(2, "input")], ids=["pomt", "random"])
def test_deepcopy(build: Any, images: Tensor, name: str, method: Any) -> None:
    model = build(name)
    lp.patch(model, method, REMOVED if method == "pomt" else [9, 0, 0, 0])
    model(images)
    same_when_patched(model, copy.deepcopy(model), images)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickle(build: Any, images: Tensor, name: str, protocol: int) -> None:
    model = build(name)
    lp.patch(model, "pomt", REMOVED)
    model(images)
    same_when_patched(model, pickle.loads(pickle.dumps(model, protocol)), images)


def test_torch_save(build: Any, images: Tensor) -> None:
    model = build()
    lp.patch(model, "pomt", REMOVED)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    same_when_patched(model, torch.load(file, weights_only=False), images)


def test_a_copy_does_not_share_the_state_of_the_patch(build: Any) -> None:
    model = build()
    lp.patch(model, "pomt", REMOVED)
    other = copy.deepcopy(model)
    sites = [m.__dict__["_prune_patch"] for m in model.modules() if "_prune_patch" in m.__dict__]
    copies = [m.__dict__["_prune_patch"] for m in other.modules() if "_prune_patch" in m.__dict__]
    assert len(sites) == len(copies) == 4, "two blocks, the last one and the root"
    assert not {id(site) for site in sites} & {id(site) for site in copies}


def test_an_unpickled_handle_is_not_needed_to_patch_again(build: Any, images: Tensor, leaving: Any) -> None:
    model = build()
    lp.patch(model, "pomt", REMOVED)
    other = pickle.loads(pickle.dumps(model))
    handle = lp.patch(other, "random", [3, 0, 0, 0])
    assert leaving(other, images) == (23, 23, 23, 23)
    handle.remove()
    assert leaving(other, images) == (26, 26, 26, 26)


def test_state_dict_round_trip(build: Any, images: Tensor, tmp_path: Path) -> None:
    model, dense = build(), build(seed=1)
    expected = model(images)
    handle = lp.patch(model, "pomt", REMOVED)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    dense.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(dense(images), expected)
    model.load_state_dict(build(seed=1).state_dict())
    handle.remove()
    assert torch.equal(model(images), build(seed=1)(images))


PROGRAM = """
import sys, torch
model, images, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(images), expected), "pruned"
import lightning_prune as lp
lp.patching.unpatch(model)
assert type(model.blocks[1]).__name__ == "Block", type(model.blocks[1])
assert "lightning" not in sys.modules
"""


def test_in_a_fresh_interpreter(build: Any, images: Tensor, tmp_path: Path) -> None:
    model = build("dinov2-registers")
    lp.patch(model, "pomt", REMOVED)
    with torch.no_grad():
        torch.save((model, images, model(images)), tmp_path / "model.pt")
    done = run_fresh(PROGRAM, str(tmp_path / "model.pt"))
    assert done.returncode == 0, done.stderr
