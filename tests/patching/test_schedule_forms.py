"""Profiling, planning and patching of methods that reduce once, before block 0, or in many blocks."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from helpers.watch import before_forward
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.schedule_forms import (
    allocate_schedule,
    is_multi_block,
    reducing_block,
    resolve_schedule,
)
from lightning_prune.reduction import POMT, RandomDrop, Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import take_tokens

IMAGES = noise_images(6)
N, DEPTH = 17, 4


class Everywhere(Reduction):
    """Drops the last tokens, at most two per block, evenly from block `block` on."""

    name = "everywhere"
    multi_block = True

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        batch, tokens, _ = sequence.tokens.shape
        index = torch.arange(tokens - remove, device=sequence.tokens.device).expand(batch, -1)
        return ReductionOutput(take_tokens(sequence.tokens, index), index)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return 2

    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        width = depth - block
        share = [remove // width + (index < remove % width) for index in range(width)]
        return [0] * block + share

    def max_total_removed(self, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> int:
        return 2 * (depth - block)


class WrongTotal(Everywhere):
    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        return [remove + 1] + [0] * (depth - 1)


class AdaptiveEverywhere(Everywhere):
    adaptive = True


@pytest.mark.parametrize(
    ("reduction", "block", "expected"),
    [
        (POMT(), 0.5, 2),
        (POMT(), 3, 3),
        (RandomDrop(site="input"), 0.5, 0),
        (RandomDrop(site="input"), 3, 0),
        (Everywhere(), 0.5, 0),
        (Everywhere(), 3, 3),
    ],
)
def test_reducing_block(reduction: Reduction, block: int | float, expected: int) -> None:
    assert reducing_block(reduction, block, find_vision_transformer(tiny_vit())) == expected


def test_an_invalid_block_is_rejected_for_every_method() -> None:
    for reduction in (POMT(), RandomDrop(site="input"), Everywhere()):
        with pytest.raises(lp.ArgumentError, match=r"`block` must be an index from 0 to 3 or a fraction"):
            reducing_block(reduction, 4, find_vision_transformer(tiny_vit()))


def test_is_multi_block() -> None:
    assert [is_multi_block(r) for r in (POMT(), RandomDrop(site="input"), Everywhere())] == [False, False, True]


def test_allocate_schedule() -> None:
    def removed(reduction: Reduction, remove: int, block: int = 0) -> tuple[int, ...]:
        return allocate_schedule(reduction, remove, N, 1, DEPTH, block).removed

    assert removed(POMT(), 5, 1) == (0, 5, 0, 0)
    assert removed(RandomDrop(site="input"), 5, 0) == (5, 0, 0, 0)
    assert removed(Everywhere(), 7) == (2, 2, 2, 1)
    assert removed(Everywhere(), 3, 2) == (0, 0, 2, 1)
    assert removed(WrongTotal(), 0) == (0, 0, 0, 0)


def test_a_wrong_allocation_is_rejected() -> None:
    with pytest.raises(
        lp.ArgumentError, match=r"`allocate` of everywhere must return 4 numbers with the sum 3, got \[4"
    ):
        allocate_schedule(WrongTotal(), 3, N, 1, DEPTH, 0)


def count_tokens(norm: nn.Module) -> set[int]:
    """The numbers of tokens that a normalisation receives from now on, in a set that grows; hooks are left out."""
    seen: set[int] = set()
    before_forward(norm, lambda _, args: seen.add(args[0].shape[1]))
    return seen


def test_profile_counts_what_leaves_the_last_block() -> None:
    model = tiny_vit()
    left, seen = count_tokens(model.norm), count_tokens(model.blocks[1].norm1)
    profile = lp.profile_latency(model, IMAGES[:1], method=Everywhere(), time_limit=3, verbose=False)
    assert (profile.tokens[0], profile.dense_tokens) == (N - 8, N)
    assert left == set(profile.tokens)
    assert seen - {5} == {15, 16, 17}  # 5 are of the trial that a block is taken apart on
    assert (profile.method, profile.block) == ("everywhere", 0)


def test_input_methods_are_profiled_before_block_0() -> None:
    model = tiny_vit()
    seen = count_tokens(model.blocks[0].norm1)
    shared: dict[str, Any] = {"method": RandomDrop(site="input"), "counts": [9], "time_limit": 0.1, "verbose": False}
    assert lp.profile_latency(model, IMAGES[:1], **shared).block == 0
    assert seen == {9, 17}


def test_a_number_takes_the_usual_form_of_the_method() -> None:
    transformer = find_vision_transformer(tiny_vit())
    assert resolve_schedule(5, transformer, Everywhere(), 0.25, IMAGES).removed == (2, 1, 1, 1)
    assert resolve_schedule(5, transformer, RandomDrop(site="input"), 0.25, IMAGES).removed == (5, 0, 0, 0)
    rates = resolve_schedule(0.75, transformer, Everywhere(), 0.25, IMAGES)
    assert isinstance(rates, lp.KeepRates)
    assert rates.schedule(N).removed == (1, 1, 1, 1)
    with pytest.raises(lp.ScheduleError, match=r"at most .* of the 17 tokens with .*, got 9"):
        resolve_schedule(9, transformer, Everywhere(), 0.25, IMAGES)


def test_tokens_are_counted_if_they_depend_on_the_images() -> None:
    transformer = find_vision_transformer(tiny_vit(dynamic_img_size=True))
    large = torch.zeros(1, 3, 64, 64)
    assert resolve_schedule(0.9, transformer, Everywhere(), 0.25, large).schedule(65).total_removed == 6


def test_adaptive_methods_are_rejected() -> None:
    message = "`method` must be one with a fixed number of tokens, got everywhere"
    with pytest.raises(lp.ArgumentError, match=message):
        lp.profile_latency(tiny_vit(), IMAGES[:1], method=AdaptiveEverywhere(), verbose=False)
    with pytest.raises(lp.ArgumentError, match=message), warnings.catch_warnings():
        lp.plan(tiny_vit(), IMAGES[:1], calibration=IMAGES, methods=AdaptiveEverywhere(), verbose=False)
