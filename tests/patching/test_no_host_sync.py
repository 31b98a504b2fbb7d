"""A patched forward pass creates all tensors on the device and does not synchronise with the host, on a fake device.

`vwt-inter` with `pad_to="batch"`, which synchronises once, is not included.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers.models.dinov3_vit import modeling_dinov3_vit

import lightning_prune as lp
from lightning_prune.reduction import (
    METHODS,
    POMT,
    RandomDrop,
    Reduction,
    ReductionOutput,
    TokenSequence,
    ToMe,
    VWTInter,
)

from .conftest import build_vit
from .fake_device import DEVICE, OnOneDevice, away, move
from .huggingface_models import KINDS, build_hf
from .sweep import coverage
from .test_timm_families import MODELS as TIMM
from .test_torchvision import build_tv

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available() and TORCH < (2, 10),
    reason="fake CUDA tensors of this torch ask a real GPU for its properties",
)
WORDS = torch.rand(6, 48, generator=torch.Generator().manual_seed(0))
ALL: dict[str, Callable[[], Reduction]] = {
    **{name: kind for name, kind in METHODS.items() if kind is not VWTInter},
    "pomt-nearest": lambda: POMT("nearest"),
    "tome-unweighed": lambda: ToMe(proportional_attention=False),
    "random-input": lambda: RandomDrop(0, "input"),
    "vwt-inter": lambda: VWTInter(lp.Vocabulary(WORDS, 4), pad_to="image"),
}


def schedule_of(reduction: Reduction) -> list[int] | None:
    if reduction.adaptive:
        return None
    if reduction.scales_images:
        return [9, 0, 0, 0]
    return [6, 0, 0, 0] if reduction.site == "input" else [0, 6, 5, 0]


def operations(model: Any, reduction: Reduction, schedule: list[int] | None, dtype: torch.dtype = torch.float32) -> int:
    """Number of operations that the patch adds on the fake device; operations elsewhere fail the test."""
    size = coverage.image_size(model) if type(model).__module__.startswith("timm") else (20, 20)
    with lp.patch(model, reduction, schedule) as handle, away():
        move(model, dtype)
        images = torch.empty(2, 3, *size, dtype=dtype, device=DEVICE)
        model(images)  # what is made once (a table, the words of a vocabulary) may come from the host
        with OnOneDevice() as patched:
            model(images)
        handle.remove()
        with OnOneDevice() as dense:
            model(images)
    assert patched.elsewhere == dense.elsewhere  # timm makes the grid of its rotary embeddings on the host
    return patched.count - dense.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ALL)
def test_every_method(method: str, dtype: torch.dtype) -> None:
    reduction = ALL[method]()
    assert operations(build_vit(), reduction, schedule_of(reduction), dtype) > 5


class Synchronising(RandomDrop):
    """A reduction that synchronises, which is not allowed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        tokens = sequence.tokens
        if self.how == "item":
            tokens.sum().item()
        elif self.how == "shapes":
            tokens[tokens > 0]
        elif self.how == "copies":
            torch.arange(3).to(tokens.device)
        elif self.how == "mixes":
            tokens + torch.zeros(tokens.shape)
        elif self.how == "masks":
            tokens.clone()[tokens > 0] = tokens.new_zeros(())
        return super().reduce(sequence, remove)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("item", DataDependentOutputException, "_local_scalar_dense"),
        ("shapes", DynamicOutputShapeException, "nonzero"),
        ("copies", AssertionError, "arange"),
        ("masks", AssertionError, "index_put"),
        ("mixes", RuntimeError, "at least two devices|two different devices"),
    ],
)
def test_a_host_sync_is_detected(how: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        operations(build_vit(), Synchronising(how), [0, 6, 5, 0])


MODEL_ADAPTERS: dict[str, Callable[[], Any]] = {
    **TIMM,
    **{kind: lambda kind=kind: build_hf(kind) for kind in KINDS},
    "torchvision": build_tv,
}


@pytest.mark.long
@pytest.mark.parametrize("family", MODEL_ADAPTERS)
def test_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sizes, positions and attention if the family supports them."""
    centres = modeling_dinov3_vit.get_patches_center_coordinates  # keeps what it made, for whoever asks next
    monkeypatch.setattr(modeling_dinov3_vit, "get_patches_center_coordinates", centres.__wrapped__)
    method = "tome-unweighed" if family in ("cait", "convit") else "tome"
    assert operations(MODEL_ADAPTERS[family](), ALL[method](), [0, 3, 3, 0]) > 50
