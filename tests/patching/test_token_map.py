"""The token of each patch."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_prune as lp
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer, trace_tokens
from lightning_prune.reduction import POMT, RandomDrop, ReductionOutput, TokenSequence

from .test_pooling import Merged


class Seen(POMT):
    """POMT, which records its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: list[ReductionOutput] = []

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        self.returned.append(super().reduce(sequence, remove))
        return self.returned[-1]


def test_tokens_fused_in_two_blocks(build: Any, images: Tensor) -> None:
    model, method = build("dinov2-registers"), Seen()
    dense = model(images)
    trace = trace_tokens(model, images, method, [0, 6, 0, 5])
    first, second = (reduced.positions for reduced in method.returned)
    for image in range(len(images)):
        for patch in range(25):
            now = 5 + patch
            for positions in (first[image].tolist(), second[image].tolist()):
                now = positions.index(now) if now in positions else positions.index(-1)
            assert trace.groups[image, patch] == now
            assert trace.held[image, now] == (trace.groups[image] == now).sum()
    assert trace.held.sum(1).tolist() == [25, 25]
    assert trace.held[:, :5].sum() == 0, "prefix tokens hold no patch"
    assert trace.tokens.tolist() == [19, 19]
    assert trace.grid == (5, 5)
    assert torch.equal(model(images), dense)


def test_merged_tokens_share_a_group(build: Any, images: Tensor) -> None:
    trace = trace_tokens(build(), images, Merged(), [0, 3, 2, 0])
    assert trace.groups[0].tolist() == [1, 1, 1, 1, 2, 2, 2, *range(3, 21)]
    assert trace.held[1].tolist()[:4] == [0, 4, 3, 1]
    assert (trace.groups >= 0).all()


def test_dropped_tokens_have_no_group(build: Any, images: Tensor) -> None:
    trace = trace_tokens(build(), images, RandomDrop(), [0, 6, 4, 0])
    assert (trace.groups < 0).sum(1).tolist() == [10, 10]
    kept = trace.groups[0][trace.groups[0] >= 0]
    assert kept.tolist() == list(range(1, 16)), "those that stay keep their order"


def test_non_square_grid(build: Any) -> None:
    model = build(img_size=(12, 20))
    trace = trace_tokens(model, torch.randn(1, 3, 12, 20), "random", lp.Schedule.single(4, 1, 5))
    assert trace.grid == (3, 5)


def test_an_empty_schedule_is_rejected(build: Any, images: Tensor) -> None:
    model = build()
    with pytest.raises(ArgumentError, match="`schedule` must remove tokens to be traced, got"):
        trace_tokens(model, images, "pomt", [0, 0, 0, 0])
    assert not any("_prune_patch" in vars(block) for block in find_vision_transformer(model).blocks)


def test_a_schedule_of_several_methods(build: Any, images: Tensor) -> None:
    """As one method after the other: the tokens of the first are the patches of the second."""
    trace = trace_tokens(build(), images, lp.Schedule([0, 6, 4, 0], [None, "tome", "random", None]))
    merged = trace_tokens(build(), images, "tome", [0, 6, 0, 0])
    assert trace.tokens.tolist() == [16, 16]
    assert ((trace.groups < 0).sum(1) >= 4).all(), "random drops four tokens, some of several patches"
    for image in range(len(images)):
        together = merged.groups[image]
        for token in together.unique():
            assert len(trace.groups[image][together == token].unique()) == 1, "what is merged stays together"
    assert len(trace.groups[0].unique()) == 16  # 15 patch tokens that are left, and -1


@torch.no_grad()
def test_models_with_a_grid_are_traced() -> None:
    from timm.models.qwen3_vit import Qwen3VitEncoder

    model = Qwen3VitEncoder(img_size=24, patch_size=4, embed_dim=32, depth=4, num_heads=4, global_pool="").eval()
    trace = trace_tokens(model, torch.randn(2, 3, 24, 24), "tome", [0, 9, 0, 0], restore="auto")
    assert trace.tokens.tolist() == [27, 27]
    assert trace.held.sum(dim=1).tolist() == [36, 36]
    assert trace.grid == (6, 6)
