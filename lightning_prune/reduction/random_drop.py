"""Random pruning: the baseline that every method must beat, and the reduction of the POMT paper's latency profiles."""

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_prune._utils.validation import check_choice, check_int
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import is_exported, keep_best

_MASK = 0xFFFFFFFF
Bits = TypeVar("Bits", int, Tensor)


def random_scores(count: int, seed: int, device: torch.device) -> Tensor:
    """A pseudo-random number in [0, 1) for each of `count` positions.

    It is computed from `seed` and the position by integer arithmetic (the 32-bit finaliser of MurmurHash3), not by a
    generator. So it needs no state and no host synchronisation, is the same on every device, and can be traced by
    `torch.compile`. An exported graph holds the numbers, because not every runtime has operations on bits.

    Returns:
        (count,) float32.
    """
    start = (seed * 0x9E3779B9 + 0x85EBCA6B) & _MASK
    if is_exported() and isinstance(count, int):
        numbers = [_mixed(place * 0x9E3779B1 + start & _MASK) / 2**32 for place in range(1, count + 1)]
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    return _mixed(torch.arange(1, count + 1, device=device) * 0x9E3779B1 + start & _MASK).float() / 2.0**32


def _mixed(value: Bits) -> Bits:
    """The finaliser of MurmurHash3 on 32-bit numbers, of a tensor or of Python."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


class RandomDrop(Reduction):
    """Keeps a random set of patch tokens, drawn uniformly: the same positions for all images.

    Args:
        seed: Seed of the set.
        site: `"block"` prunes between attention and MLP, `"input"` before block 0, as in the profiling protocol of the
            POMT paper (arXiv 2407.05941, section 3.2).

    Raises:
        ArgumentError: If `site` has another value, or `seed` is not an integer >= 0.
    """

    name: str = "random"
    fused_tokens = 0

    def __init__(self, seed: int = 0, site: Literal["block", "input"] = "block") -> None:
        check_choice("site", site, ("block", "input"))
        check_int("seed", seed, 0)
        self.seed = seed
        self.site = site

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Keeps the N - P - R patch tokens whose positions have the highest numbers."""
        batch, tokens, _ = sequence.tokens.shape
        patches = tokens - sequence.num_prefix_tokens
        scores = random_scores(patches, self.seed, sequence.tokens.device).expand(batch, -1)
        return keep_best(sequence.tokens, scores, remove, sequence.num_prefix_tokens)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one."""
        return max(tokens - num_prefix_tokens - 1, 0)

    def settings(self) -> dict[str, Any]:
        """`seed` and `site`."""
        return {"seed": self.seed, "site": self.site}
