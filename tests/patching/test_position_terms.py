"""Position inputs of the tokens that are left, compared entry by entry."""

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.patching.position_terms import patch_positions, take_bias, take_rotation
from lightning_prune.patching.token_state import TokenState, next_token_state
from lightning_prune.reduction.base import ReductionOutput

POSITIONS = torch.tensor([[0, 1, 2, 5, 6, -1], [0, 1, 3, 4, 7, -1]])  # two prefix tokens, 6 patches


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_patch_positions() -> None:
    assert patch_positions(POSITIONS, 2).tolist() == [[0, 3, 4, -1], [1, 2, 5, -1]]
    assert torch.equal(patch_positions(POSITIONS, 0), POSITIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (2, 1, 6, 4), (2, 3, 6, 4)])
def test_rotation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table, neutral = drawn(*shape, dtype=dtype), torch.tensor([0.0, 0.0, 1.0, 1.0])
    index = patch_positions(POSITIONS, 2)
    found = take_rotation(table, index, neutral)
    heads = 3 if 3 in shape else 1
    assert found.shape == (2, heads, 4, 4)
    assert found.dtype == dtype
    for image in range(2):
        for head in range(heads):
            rows = table[image] if len(shape) == 4 else table
            rows = rows[head if heads > 1 else 0] if len(shape) > 2 else rows
            for slot, place in enumerate(index[image].tolist()):
                expected = neutral.to(dtype) if place < 0 else rows[place]
                assert torch.equal(found[image, head, slot], expected)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 8, 8), (2, 3, 8, 8)])
def test_bias(shape: tuple[int, ...]) -> None:
    bias = drawn(*shape).double()
    found = take_bias(bias, POSITIONS, 2)
    assert found.shape == (2, 3, 6, 6)
    for image in range(2):
        table = bias[image if len(shape) == 4 and shape[0] == 2 else 0] if len(shape) == 4 else bias
        for row, i in enumerate(POSITIONS[image].tolist()):
            for column, j in enumerate(POSITIONS[image].tolist()):
                part = table[:, 2:] if i < 0 else table[:, i : i + 1]
                part = part[..., 2:] if j < 0 else part[..., j : j + 1]
                torch.testing.assert_close(found[image, :, row, column], part.mean(dim=(1, 2)))


def test_state_is_relative_to_block_0() -> None:
    first = next_token_state(
        None,
        ReductionOutput(torch.empty(1), torch.tensor([[0, 2, 3, 5, -1]])),
        positions_needed=True,
        weighs_keys=False,
    )
    assert first.positions.tolist() == [[0, 2, 3, 5, -1]]
    reduced = ReductionOutput(torch.empty(1), torch.tensor([[0, 1, 4, -1]]), torch.tensor([[1.0, 2.0, 0.0, 4.0]]))
    second = next_token_state(first, reduced, positions_needed=True, weighs_keys=True)
    assert second.positions.tolist() == [[0, 2, -1, -1]]
    assert (first.num_tokens, second.num_tokens) == (5, 4)
    assert second.sizes is reduced.sizes
    assert second.log_sizes is not None
    assert second.log_sizes.shape == (1, 1, 1, 4)
    assert second.log_sizes.flatten().tolist() == pytest.approx([0.0, math.log(2), -math.inf, math.log(4)])


def test_only_needed_state_is_computed() -> None:
    reduced = ReductionOutput(torch.empty(1), torch.tensor([[0, 2]]), torch.ones(1, 2))
    first = next_token_state(None, reduced, positions_needed=False, weighs_keys=False)
    second = next_token_state(first, reduced, positions_needed=False, weighs_keys=False)
    assert first == second == TokenState(2, [], None, reduced.sizes, None, ())


def test_shared_inputs_are_gathered_once() -> None:
    token_state, calls = TokenState(6, [], POSITIONS), []

    def gather(source: Tensor) -> Tensor:
        calls.append(source)
        return source + 1

    shared, other = torch.zeros(1), torch.zeros(1)
    assert token_state.adapt_once(shared, gather) is token_state.adapt_once(shared, gather)
    token_state.adapt_once(other, gather)
    assert len(calls) == 2
