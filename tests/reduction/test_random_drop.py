from typing import Any

import pytest
import torch

from helpers import reference as naive
from lightning_prune.errors import ArgumentError
from lightning_prune.reduction import RandomDrop, TokenSequence


def kept(seed: int, tokens: int, remove: int, prefix: int = 0, batch: int = 1) -> torch.Tensor:
    x = torch.arange(tokens, dtype=torch.float32).view(1, tokens, 1).expand(batch, tokens, 3)
    return RandomDrop(seed).reduce(TokenSequence(x, prefix, prefix > 0), remove).positions


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**63])
def test_kept_positions_match_the_reference(prefix: int, seed: int) -> None:
    tokens = prefix + 20
    x = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(0))
    for remove in (1, 7, 19):
        reduced = RandomDrop(seed).reduce(TokenSequence(x, prefix, prefix > 0), remove)
        for b in range(2):
            expected, positions = naive.random(x[b], remove, prefix, seed)
            assert reduced.positions[b].tolist() == positions
            assert torch.equal(reduced.tokens[b].double(), expected)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_order_and_prefix_are_kept(prefix: int) -> None:
    for seed in range(20):
        positions = kept(seed, prefix + 30, 11, prefix)[0].tolist()
        assert len(positions) == prefix + 19
        assert positions[:prefix] == list(range(prefix))
        assert positions == sorted(set(positions))


def test_all_images_keep_the_same_positions() -> None:
    alone = kept(3, 50, 20, prefix=1)
    for batch in (2, 7):
        assert torch.equal(kept(3, 50, 20, prefix=1, batch=batch), alone.expand(batch, -1))


def test_the_global_generator_is_not_used() -> None:
    before = torch.get_rng_state()
    kept(0, 50, 20)
    assert torch.equal(torch.get_rng_state(), before)


def test_removing_more_keeps_a_subset() -> None:
    more, less = set(kept(5, 40, 30)[0].tolist()), set(kept(5, 40, 10)[0].tolist())
    assert more < less


def test_uniform_over_seeds() -> None:
    """Each position is kept equally often: chi-square of 48 degrees of freedom, mean 48, deviation 9.8."""
    positions, removed, seeds = 49, 29, 2000
    counts = torch.zeros(positions)
    for seed in range(seeds):
        counts[kept(seed, positions, removed)[0]] += 1
    share = (positions - removed) / positions
    spread = seeds * share * (1 - share)
    chi_square = ((counts - seeds * share) ** 2 / spread).sum().item() * (positions - 1) / positions
    assert 48 - 4 * 9.8 < chi_square < 48 + 4 * 9.8


@pytest.mark.parametrize("step", [1, 2, 8, 2**16])
def test_seeds_are_independent(step: int) -> None:
    """Two seeds share as many positions as two independent draws do: 20 * 20 / 49 = 8.2 (hypergeometric)."""
    seeds = 500
    shared = [
        len(set(kept(seed, 49, 29)[0].tolist()) & set(kept(seed + step, 49, 29)[0].tolist())) for seed in range(seeds)
    ]
    assert sum(shared) / seeds == pytest.approx(20 * 20 / 49, abs=0.35)  # 4 deviations of the mean
    assert max(shared) < 20


def test_neighbours_are_independent() -> None:
    """The shares of pairs at distance 1 and 7 (the next row) that are kept together are those of independent draws."""
    masks = torch.zeros(1000, 49)
    for seed in range(1000):
        masks[seed, kept(seed, 49, 29)[0]] = 1
    for distance in (1, 7):
        together = (masks[:, distance:] * masks[:, :-distance]).mean().item()
        assert together == pytest.approx(20 * 19 / (49 * 48), abs=0.006)


def test_max_removed_is_all_patches_except_one() -> None:
    assert RandomDrop().max_removed(197, 1) == 195
    assert RandomDrop().max_removed(1, 1) == 0
    assert RandomDrop().max_removed(2, 5) == 0


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, None])
def test_invalid_seed_is_rejected(seed: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`seed` must be an integer >= 0, got"):
        RandomDrop(seed=seed)


def test_invalid_site_is_rejected() -> None:
    with pytest.raises(ArgumentError, match=r"`site` must be 'block' or 'input', got 'head'\."):
        RandomDrop(site="head")
