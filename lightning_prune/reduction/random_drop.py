"""Random pruning: the floor that every method must beat, and the probe of the POMT paper's profile."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.errors import ArgumentError
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import best_in_order, take_tokens, with_prefix

_MASK = 0xFFFFFFFF


def random_scores(count: int, seed: int, device: torch.device) -> Tensor:
    """A fixed pseudo-random number in [0, 1) for each of `count` positions.

    Computed from `seed` and the position with integer arithmetic (the 32-bit finaliser of MurmurHash3) instead of a
    generator: no state, no host synchronisation, the same on every device, and traceable by `torch.compile`.

    Returns:
        (count,) float32.
    """
    start = (seed * 0x9E3779B9 + 0x85EBCA6B) & _MASK
    value = (torch.arange(1, count + 1, device=device) * 0x9E3779B1 + start) & _MASK
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return (value ^ (value >> 16)).float() / 2.0**32


class RandomDrop(Reduction):
    """Keeps a uniformly drawn, seeded set of patch tokens: the same positions for every image, others for every seed.

    Args:
        seed: Which set.
        site: `"block"` prunes between attention and MLP, `"input"` before block 0, as the POMT paper's profiling
            protocol does (arXiv 2407.05941, section 3.2).

    Raises:
        ArgumentError: If `site` is neither, or `seed` is not a whole number >= 0.
    """

    name: str = "random"

    def __init__(self, seed: int = 0, site: Literal["block", "input"] = "block") -> None:
        if site not in ("block", "input"):
            raise ArgumentError(f"`site` must be 'block' or 'input', got {site!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ArgumentError(f"`seed` must be a whole number >= 0, got {seed!r}.")
        self.seed = seed
        self.site = site

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Keeps the N - P - R patch tokens whose positions drew the highest numbers."""
        batch, tokens, _ = sequence.tokens.shape
        patches = tokens - sequence.num_prefix_tokens
        scores = random_scores(patches, self.seed, sequence.tokens.device).expand(batch, -1)
        index = with_prefix(best_in_order(scores, patches - remove), sequence.num_prefix_tokens)
        return ReductionOutput(take_tokens(sequence.tokens, index), index)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens but one."""
        return max(tokens - num_prefix_tokens - 1, 0)

    def settings(self) -> dict[str, Any]:
        """`seed` and `site`."""
        return {"seed": self.seed, "site": self.site}
